"""The feed-forward in two halves: the same tokens, a peak of memory that merging does not raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pipelines
import pytest
import torch
from ldm import LdmUNet
from test_hooks import call_ldm, call_unet, same, trace
from torch import Tensor, nn

from tome_sampler import MergeConfig, MergeSession, ModelCall, demo, merging
from tome_sampler.bench.parts import profiled
from tome_sampler.hosts.feedforward import HalvedFeedForward
from tome_sampler.hosts.modules import attached
from tome_sampler.spelling import read_config

CPU = torch.device("cpu")
CONFIG = MergeConfig(min_tokens=0)
FEW_IN_FEED_FORWARDS = CONFIG.with_(modules=("attn1", "ff"), ratio=0.1, threshold=None, early_ratio=None)
Call = Callable[..., Tensor]


@pytest.fixture(params=["diffusers", "ldm"])
def host(request: pytest.FixtureRequest) -> tuple[nn.Module, Call]:
    if request.param == "diffusers":
        return request.getfixturevalue("unet"), call_unet
    return request.getfixturevalue("ldm_unet"), call_ldm


def feed_forwards(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if name.endswith(".ff")}


def watched(model: nn.Module) -> dict[str, list[int]]:
    """How many tokens each feed-forward works on for two rows of a batch, call by call; looked at where neither a
    hook is seen nor a forward of its own."""
    seen: dict[str, list[int]] = {}
    for name, layer in feed_forwards(model).items():
        original = type(layer).forward

        def forward(layer: nn.Module, x: Tensor, name: str = name, forward: Call = original) -> Tensor:
            assert x.is_contiguous()
            seen.setdefault(name, []).append(x.numel() // x.shape[-1] // 2)
            return forward(layer, x)  # type: ignore[no-any-return]

        layer.__class__ = type("Watched", (type(layer),), {"forward": forward})
    return seen


def small(name: str) -> tuple[nn.Module, Callable[[], Any], tuple[int, int], int]:
    """A model, a call of it, the latent's size, and the images in each branch."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if name == "embedded":
        scenes = demo.load_model()
        x, context = noise(2, 12, 64, 64), demo.encode(["", "a red circle"])
        return scenes, lambda: scenes(x, torch.tensor(500), context), (64, 64), 1
    if name == "ldm":
        model = LdmUNet(32).eval().requires_grad_(False)
        latent, text = noise(2, 4, 48, 48), noise(2, 3, 8)
        return model, lambda: model(latent, torch.tensor([500.0, 500.0]), context=text), (48, 48), 1
    if name == "pixart":
        config = {**pipelines.pixart_transformer().config, "attention_head_dim": 64, "num_layers": 4}
        transformer = type(pipelines.pixart_transformer()).from_config(config | {"cross_attention_dim": 128}).eval()
        latent, text = noise(2, 4, 64, 64), noise(2, 5, transformer.config.caption_channels)
        times, given = torch.tensor([500, 500]), {"resolution": None, "aspect_ratio": None}
        return transformer, lambda: transformer(latent, text, times, given), (64, 64), 1
    motion = pipelines.motion_unet().eval()
    width = motion.config.cross_attention_dim
    clip, words = noise(2, 4, 3, 32, 32), noise(6, 3, width)
    return motion, lambda: motion(clip, torch.tensor(500), encoder_hidden_states=words), (32, 32), 3


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        *(("embedded", preset) for preset in ("default", "quality", "fast", "tomesd")),
        ("ldm", "default"),
        ("ldm", "default:early_modules=block"),
        ("animatediff", "default"),
        # whole blocks, of which few tokens are merged
        ("embedded", "quality:modules=block,floor=0"),
        ("embedded", "default:modules=block,ratio=0.1,threshold=None,early_ratio=None"),
        ("embedded", "default:early_modules=block,early_ratio=0.1,threshold=None"),
        ("pixart", "default:modules=block"),
        # feed-forwards that merge on their own, few of their tokens, or in one part of a run only
        ("embedded", "default:modules=attn1+ff,ratio=0.1,threshold=None,early_ratio=None"),
        ("embedded", "default:early_modules=attn1+ff,threshold=None"),
        ("pixart", "default:modules=attn1+attn2+ff,threshold=None"),
        # attention that keeps all of its logits
        ("ldm", "default:ratio=0.06,threshold=None,early_ratio=None"),
        ("ldm", "default:ratio=0.1,threshold=None,early_ratio=None"),
    ],
)
def test_the_peak_with_merging_is_never_above_the_peak_without(name: str, preset: str) -> None:
    """Nor in the run's early part, nor on a step that makes pairs, nor with all that is kept by then."""
    model, call, size, images = small(name)
    session = MergeSession(read_config(preset, {"min_tokens": 0, "floor": 0.2}))
    with torch.no_grad():
        call()
        plain = profiled(call, CPU, 0)[0].peak
        left, peaks = 0, []
        with attached(model, session):
            for sigma in (9.0, 8.9, 1.0, 0.99, 0.98):
                told = ModelCall.chunked(sigma, size, ("uncond", "cond"), images)

                def step(told: ModelCall = told) -> None:
                    with session.call(told):
                        out = call()
                        half = (out if isinstance(out, Tensor) else out[0]).detach().chunk(2)
                    session.observe(half[1], half[0])

                cost, left = profiled(step, CPU, left)
                peaks.append(cost.peak)
    assert session.stats.to_dict()["merged_fraction"] > 0.05
    assert max(peaks) <= plain


def test_halves_give_the_same_tokens_and_only_the_largest_layers_are_halved(host: tuple[nn.Module, Call]) -> None:
    model, call = host
    seen = watched(model)
    with torch.no_grad():
        call(model)
        whole = {name: tokens.copy() for name, tokens in seen.items()}
        [tokens.clear() for tokens in seen.values()]
        with merging(model, CONFIG, branches=("uncond", "cond")):
            halved = call(model)
        in_halves = {name: tokens.copy() for name, tokens in seen.items()}
        kept = [layer.register_forward_hook(lambda *_: None) for layer in feed_forwards(model).values()]
        [tokens.clear() for tokens in seen.values()]
        with merging(model, CONFIG, branches=("uncond", "cond")):
            at_once = call(model)
        assert seen == whole  # others' hooks want to see all tokens
        [handle.remove() for handle in kept]
    finest = max(tokens[0] for tokens in whole.values())
    for name, (tokens,) in whole.items():
        assert in_halves[name] == ([tokens // 2, tokens // 2] if tokens == finest else [tokens])
    assert any(tokens[0] < finest for tokens in whole.values())
    torch.testing.assert_close(halved, at_once)


def test_halves_of_merged_tokens_give_the_same_tokens(host: tuple[nn.Module, Call]) -> None:
    model, call = host
    with torch.no_grad():
        with merging(model, FEW_IN_FEED_FORWARDS):
            halved = call(model)
        kept = [layer.register_forward_hook(lambda *_: None) for layer in feed_forwards(model).values()]
        seen = watched(model)
        with merging(model, FEW_IN_FEED_FORWARDS):
            at_once = call(model)
    assert all(len(tokens) == 1 for tokens in seen.values())  # others' hooks want to see all tokens
    [handle.remove() for handle in kept]
    torch.testing.assert_close(halved, at_once)


@pytest.mark.parametrize(("b", "tokens"), [(1, [20, 20]), (2, [40, 40]), (3, [81, 40])])
def test_an_odd_number_of_tokens_or_rows_loses_none(ldm_unet: LdmUNet, b: int, tokens: list[int]) -> None:
    with merging(ldm_unet, CONFIG):
        at_once = call_watched_by_others(ldm_unet, b)
    seen = watched(ldm_unet)
    with merging(ldm_unet, CONFIG):
        torch.testing.assert_close(call_ldm(ldm_unet, b=b, size=9), at_once)
    assert seen["first.ff"] == tokens


def call_watched_by_others(model: LdmUNet, b: int) -> Tensor:
    """With hooks of others, for which feed-forwards run at once."""
    kept = [layer.register_forward_hook(lambda *_: None) for layer in feed_forwards(model).values()]
    try:
        return call_ldm(model, b=b, size=9)
    finally:
        [handle.remove() for handle in kept]


@pytest.mark.parametrize(
    ("modules", "ratio", "tokens"),
    [(modules, *left) for modules in (("attn1", "ff"), ("block",)) for left in ((0.5, [32]), (0.1, [29, 29]))],
)
def test_on_merged_tokens_of_its_own_or_its_block_s_a_layer_is_halved_where_many_are_left(
    ldm_unet: LdmUNet, modules: tuple[str, ...], ratio: float, tokens: list[int]
) -> None:
    seen = watched(ldm_unet)
    with merging(ldm_unet, FEW_IN_FEED_FORWARDS.with_(modules=modules, ratio=ratio), branches=("uncond", "cond")):
        call_ldm(ldm_unet)
    assert seen["first.ff"] == tokens


def test_with_blocks_merged_early_the_later_part_is_halved(ldm_unet: LdmUNet) -> None:
    seen = watched(ldm_unet)
    with merging(ldm_unet, CONFIG.with_(early_modules=("block",)), branches=("uncond", "cond")):
        for t in (900, 890, 300):
            call_ldm(ldm_unet, t=t)
    assert seen["first.ff"] == [16, 16, 32, 32]


def test_where_nothing_is_merged_nothing_is_halved_and_no_hook_is_left(host: tuple[nn.Module, Call]) -> None:
    """No pairs in an unmerged run, and none any more once another size has begun."""
    model, call = host

    def are_hooked() -> bool:
        return any(m._forward_pre_hooks or m._forward_hooks for m in feed_forwards(model).values())

    before, plain = trace(model), call(model)
    with merging(model, CONFIG.with_(ratio=0.0)):
        assert torch.equal(call(model), plain)
        assert not are_hooked()
    with merging(model, MergeConfig(min_tokens=100)) as session:
        call(model, t=500, size=16)
        call(model, t=400, size=16)
        assert are_hooked()
        assert session.largest
        call(model, t=300, size=8)
        assert not are_hooked()
        assert not session.largest
    assert same(before, trace(model))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("half", [1, 2])
@pytest.mark.parametrize("config", [CONFIG, FEW_IN_FEED_FORWARDS])
def test_an_error_in_either_half_leaves_nothing_behind(
    host: tuple[nn.Module, Call], config: MergeConfig, half: int, error: type[BaseException]
) -> None:
    model, call = host
    before = trace(model)
    with merging(model, config):
        expected = call(model, t=300)
    name, layer = next(iter(feed_forwards(model).items()))
    forward, calls = layer.forward, []

    def fail(x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) == half:
            raise error("in a half")
        return forward(x)

    with merging(model, config) as session:
        layer.forward = fail  # type: ignore[method-assign]
        with pytest.raises(error):
            call(model, t=300)
        del layer.forward
        assert len(calls) == half, name
        session.reset()
        assert torch.equal(call(model, t=300), expected)
    assert same(before, trace(model))


def test_a_feed_forward_that_sees_neighbours_runs_at_once(ldm_unet: LdmUNet) -> None:
    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.transpose(1, 2)).transpose(1, 2)

    ldm_unet.first.ff = Convolution()  # type: ignore[union-attr]
    seen = watched(ldm_unet)
    with merging(ldm_unet, CONFIG, branches=("uncond", "cond")):
        call_ldm(ldm_unet)
    assert seen["first.ff"] == [64]
    assert seen["last.ff"] == [32, 32]


def in_halves(layer: nn.Module, x: Tensor) -> Any:
    """What a block's feed-forward returns while pairs are kept."""
    block, session = nn.Module(), MergeSession(CONFIG)
    block.attn1, block.ff = nn.Identity(), layer
    session.largest = x.numel()
    halves = HalvedFeedForward(block, session)
    halves.follow()
    try:
        return block.ff(x)
    finally:
        halves.remove()


def test_a_feed_forward_that_returns_more_than_tokens_runs_at_once() -> None:
    class Weighted(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x.sum(1)

    layer, x = Weighted(16, 16), torch.randn(2, 64, 16)
    for found, whole in zip(in_halves(layer, x), layer(x), strict=True):
        assert torch.equal(found, whole)


def test_a_feed_forward_that_takes_its_tokens_for_contiguous_can() -> None:
    class Flat(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(-1, 16)).view(x.shape)

    for b in (2, 3):
        layer, x = Flat(16, 16), torch.randn(b, 64, 16)
        torch.testing.assert_close(in_halves(layer, x), layer(x))


def test_a_forward_that_was_replaced_sees_all_rows() -> None:
    """It may be one that tells cond rows from others by their places, as LoRAs for one of them do."""
    layer, x = nn.Sequential(nn.Linear(16, 16)), torch.randn(2, 64, 16)
    weights = torch.tensor([1.0, 2.0])[:, None, None]
    original = layer[0].forward
    layer[0].forward = lambda x: original(x) * weights  # type: ignore[method-assign]
    torch.testing.assert_close(in_halves(layer, x), layer(x))


def test_hooks_inside_of_a_feed_forward_see_all_tokens() -> None:
    layer, x, seen = nn.Sequential(nn.Linear(16, 16)), torch.randn(2, 64, 16), []
    handle = layer[0].register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    in_halves(layer, x)
    handle.remove()
    in_halves(layer, x)
    assert seen == [64]


def test_of_nested_sessions_only_the_one_at_work_halves(ldm_unet: LdmUNet) -> None:
    seen = watched(ldm_unet)
    with merging(ldm_unet, CONFIG):
        call_ldm(ldm_unet)
        with merging(ldm_unet, CONFIG):
            call_ldm(ldm_unet, t=400)
            assert seen["first.ff"] == [32, 32, 32, 32]
        call_ldm(ldm_unet, t=300)
    assert seen["first.ff"] == [32] * 6


@pytest.mark.parametrize(("chunk", "dim"), [(1, 0), (64, 1), (32, 1)])
@pytest.mark.parametrize("modules", [("attn1", "ff"), ("block",)])
def test_feed_forwards_that_are_called_in_chunks_keep_their_tokens(
    unet: nn.Module, modules: tuple[str, ...], chunk: int, dim: int
) -> None:
    """A chunk of one level may have as many tokens as another level, whose pairs are not its own; and merged tokens
    need not divide by a chunk's size, which diffusers takes for an error."""
    config = CONFIG.with_(modules=modules, levels=2, ratio=0.7, threshold=None, early_ratio=None)
    with merging(unet, config):
        at_once = call_unet(unet)
    left = call_unet(unet)
    if "attn1" in modules:
        with merging(unet, config.with_(modules=("attn1",))):
            left = call_unet(unet)
    for module in unet.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(chunk, dim)
    with merging(unet, config) as session:
        found = call_unet(unet)
    if modules == ("block",) and dim == 0:  # whole rows: that is what a block is merged by
        torch.testing.assert_close(found, at_once)
    else:
        torch.testing.assert_close(found, left)
        assert not torch.allclose(found, at_once)
        assert session.stats.notes == ["feed-forwards are called in chunks (set_chunk_feed_forward): passed through"]
