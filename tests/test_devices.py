"""What must hold on every kind of device, on each that is here: a machine with a GPU runs it there, too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
import torch._dynamo
from conftest import tiny_unet
from diffusers.models.attention_processor import Attention
from fake_cuda import CUDA, Launches, fake_cuda, on_cuda
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tome_sampler import MergeConfig, MergeSession, ModelCall, merging
from tome_sampler.refresh import SigmaRatio

FIXED = MergeConfig(threshold=None, min_tokens=0, refresh=SigmaRatio(1.5))
SIGMAS = (8.0, 7.9, 2.0, 1.9)  # early and later, each with new pairs and with kept ones

Step = Callable[[float], Tensor]


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def cuda() -> torch.device:
    """For what says nothing on a CPU, or is tested there by other files."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA")
    return torch.device("cuda")


@contextmanager
def merged_steps(
    device: torch.device, config: MergeConfig, dtype: torch.dtype = torch.float32, compiled: str | None = None
) -> Iterator[tuple[Step, MergeSession]]:
    """Guided steps of a small U-Net, whose inputs are the same on each device and lie there already."""
    unet: nn.Module = tiny_unet().to(device, dtype)
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 4, 16, 16), (2, 3, 8)
    x, context = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    times = {sigma: torch.tensor(100.0 * sigma, device=device) for sigma in SIGMAS}
    with merging(unet, config) as session, torch.no_grad():
        model = unet if compiled is None else torch.compile(unet, mode=compiled, dynamic=False)

        def step(sigma: float) -> Tensor:
            with session.call(ModelCall.chunked(sigma, (16, 16), ("uncond", "cond"), images=1)):
                out: Tensor = model(x, times[sigma], encoder_hidden_states=context, return_dict=False)[0].clone()
            session.observe(out[1:], out[:1])
            return out

        yield step, session


def pictures(device: torch.device, config: MergeConfig, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    with merged_steps(device, config, dtype) as (step, session):
        found = [step(sigma).cpu() for sigma in SIGMAS]
    assert not session.stats.notes
    assert session.stats.to_dict()["merged_fraction"] > 0
    return found


CONFIGS = {
    "default": MergeConfig(min_tokens=0),
    "ratio": FIXED,
    "blocks": FIXED.with_(modules=("block",)),
    "tomesd": MergeConfig.preset("tomesd", min_tokens=0),
    "importance": MergeConfig.preset("importance", min_tokens=0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_tokens_are_merged_as_on_a_cpu(cuda: torch.device, name: str) -> None:
    found, on_cpu = pictures(cuda, CONFIGS[name]), pictures(torch.device("cpu"), CONFIGS[name])
    for a, b in zip(found, on_cpu, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_gives_the_same_bits_each_time(device: torch.device, name: str) -> None:
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    first, second = pictures(device, CONFIGS[name], dtype), pictures(device, CONFIGS[name], dtype)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("name", ["ratio", "blocks", "tomesd"])
def test_no_step_at_a_fixed_ratio_waits_for_the_device(cuda: torch.device, name: str) -> None:
    with merged_steps(cuda, CONFIGS[name]) as (step, session):
        step(SIGMAS[0])  # what a run does once
        with waiting_is_an_error():
            for sigma in SIGMAS[1:]:
                step(sigma)
        found = session.stats.to_dict()
    assert found["pairings_made"] > 0


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", ["ratio", "blocks", "tomesd", "importance"])
def test_on_a_cuda_device_that_is_not_there_nothing_lies_elsewhere_and_nothing_waits(name: str) -> None:
    """Without a GPU, too: a tensor on the host among those of the device, or a number asked for, would raise here."""
    unet = tiny_unet()
    with fake_cuda(), torch.no_grad(), merging(on_cuda(unet, torch.float16), CONFIGS[name]) as session:
        x, context = (torch.empty(shape, device=CUDA, dtype=torch.float16) for shape in ((2, 4, 16, 16), (2, 3, 8)))
        for sigma in SIGMAS:
            call = ModelCall.chunked(sigma, (16, 16), ("uncond", "cond"), images=1)
            with Launches() as launches, session.call(call):
                out = unet(x, torch.empty(2, device=CUDA), encoder_hidden_states=context, return_dict=False)[0]
            session.observe(out[1:], out[:1])
            assert not launches.waits
            assert out.device == CUDA
        layers = [layer for call in session.stats.calls for layer in call.layers.values()]
        assert sum(layer.pairings_made for layer in layers) > 0
        assert not session.stats.notes


def test_kept_pairs_launch_one_kernel_to_merge_one_to_unmerge_and_three_to_count_keys() -> None:
    block = nn.Module()
    block.attn1 = Attention(320, heads=8, dim_head=40, bias=False)
    found = []
    with fake_cuda(), torch.no_grad():
        on_cuda(block, torch.float16)
        x = torch.empty(2, 256, 320, device=CUDA, dtype=torch.float16)
        with Launches() as plain:
            block.attn1(x)
        with merging(block, FIXED) as session:
            for sigma in SIGMAS[:2]:
                with Launches() as launches, session.call(ModelCall.chunked(sigma, (16, 16), ("uncond", "cond"), 1)):
                    block.attn1(x)
                found.append(launches.counts)
    merging_alone = {"_embedding_bag_forward_only": 1, "embedding": 1}
    assert found[1] - plain.counts == Counter({**merging_alone, "cat": 1, "constant_pad_nd": 2})
    assert found[0].total() > found[1].total() + 20


def flash_alone() -> AbstractContextManager[None]:
    """Attention runs on the flash kernel, or raises; before torch 2.3 the profiler alone tells."""
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        return nullcontext()
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION)


def test_attention_that_counts_merged_keys_stays_on_the_flash_kernel(device: torch.device) -> None:
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    activity = ProfilerActivity.CPU if device.type == "cpu" else ProfilerActivity.CUDA
    with merged_steps(device, FIXED, dtype) as (step, _), flash_alone():
        step(SIGMAS[0])
        with profile(activities=[activity]) as found:
            step(SIGMAS[1])
    names = [event.key for event in found.key_averages()]
    assert any("flash" in name for name in names), names
    others = ("fmha_cutlass", "efficient_attention", "attention_math")
    assert not any(other in name for name in names for other in others), names


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_draws_what_it_draws_as_it_is(cuda: torch.device, mode: str) -> None:
    torch._dynamo.reset()
    with merged_steps(cuda, FIXED) as (step, _):
        plain = [step(sigma) for sigma in (*SIGMAS, *SIGMAS)]
    with merged_steps(cuda, FIXED, compiled=mode) as (step, session):
        found = [step(sigma) for sigma in (*SIGMAS, *SIGMAS)]
        made = session.stats.to_dict()["pairings_made"]
    torch._dynamo.reset()
    assert made > 0
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
