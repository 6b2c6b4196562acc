"""torch.compile of a model that merges: real graphs, checked against the same model run eagerly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from conftest import tiny_unet
from ldm import LdmUNet
from test_feedforward import watched
from test_hooks import call_ldm
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tome_sampler import MergeConfig, ModelCall, merging
from tome_sampler.hosts import compiled as compiled_hooks
from tome_sampler.hosts import modules

FIXED = MergeConfig(threshold=None, min_tokens=0)
LIMIT = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
TIMES = (900, 800, 500, 300, 200, 20)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def call(unet: nn.Module | Callable[..., Any], t: int, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(t)
    x, context = torch.randn(2, 4, size, size, generator=generator), torch.randn(2, 3, 8, generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor(t), encoder_hidden_states=context, return_dict=False)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "config",
    [
        FIXED,
        FIXED.with_(levels=2, ratio=0.75),
        FIXED.with_(modules=("attn1", "attn2", "ff")),
        FIXED.with_(modules=("block",)),
        FIXED.with_(early_modules=("block",)),
        FIXED.with_(modules=("attn1", "ff"), early_modules=("attn2",)),
        FIXED.with_(proportional=False),
        MergeConfig.preset("tomesd"),
        MergeConfig.preset("importance", ratio=0.5),
    ],
    ids=["ratio", "levels", "modules", "block", "early block", "early part", "once", "tomesd", "importance"],
)
def test_a_fixed_ratio_is_one_graph_for_each_part_of_a_run(config: MergeConfig) -> None:
    unet = tiny_unet()
    with merging(unet, config, branches=("uncond", "cond")) as session:
        eager = [call(unet, t) for t in TIMES]
        expected = session.stats.to_dict()
    with merging(unet, config, branches=("uncond", "cond")) as session:
        graphs = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(unet, backend=graphs, fullgraph=True)
        counts = []
        for t, picture in zip(TIMES, eager, strict=True):
            torch.testing.assert_close(call(compiled, t), picture, atol=1e-5, rtol=1e-5)
            counts.append(graphs.frame_count)
        found = session.stats.to_dict()
        session.reset()
        for t in TIMES:
            call(compiled, t)
    # the model, and the hook that tells of its call; the third time is no early one
    assert counts == [2, 2, *([2] * 4 if config.early is None else [3] * 4)]
    assert graphs.frame_count == counts[-1]  # a second run has its graphs
    assert 0 < found["merged_fraction"] == expected["merged_fraction"]
    assert found["pairings_made"] == expected["pairings_made"]
    assert found["pairings_reused"] == expected["pairings_reused"]


@pytest.mark.parametrize("config", [MergeConfig(min_tokens=0), FIXED.with_(start=0.2), FIXED.with_(protect=0.2)])
def test_what_has_no_fixed_length_is_merged_too(config: MergeConfig) -> None:
    unet = tiny_unet()
    with merging(unet, config, branches=("uncond", "cond")):
        eager = [call(unet, t) for t in TIMES[:3]]
    with merging(unet, config, branches=("uncond", "cond")) as session:
        compiled = torch.compile(unet, backend="eager")
        for t, picture in zip(TIMES[:3], eager, strict=True):
            torch.testing.assert_close(call(compiled, t), picture, atol=1e-5, rtol=1e-5)
    assert session.stats.to_dict()["merged_fraction"] > 0


@pytest.mark.parametrize("config", [FIXED, FIXED.with_(modules=("block",)), MergeConfig(min_tokens=0)])
@pytest.mark.parametrize("what", ["blocks", "forward", "inner model"])
@torch._dynamo.config.patch({LIMIT: 64})
def test_parts_that_are_compiled_in_a_model_that_is_not_merge_as_it_does(what: str, config: MergeConfig) -> None:
    unet = tiny_unet()
    with merging(unet, config, branches=("uncond", "cond")):
        eager = [call(unet, t) for t in TIMES]
    graphs = torch._dynamo.testing.CompileCounter()
    fullgraph = config.threshold is None
    model: Any = unet
    if what == "inner model":
        model = Wrapper(torch.compile(unet, backend=graphs, fullgraph=fullgraph))
    if what == "blocks":  # as diffusers's compile_repeated_blocks does; torch tells hooks apart, so each has its graph
        for block in (m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"):
            block.compile(backend=graphs, fullgraph=fullgraph)
    with merging(model, config, branches=("uncond", "cond")) as session:
        if what == "forward":
            unet.forward = torch.compile(unet.forward, backend=graphs, fullgraph=fullgraph)  # type: ignore[method-assign]
        for t, picture in zip(TIMES, eager, strict=True):
            torch.testing.assert_close(call(model, t), picture, atol=1e-5, rtol=1e-5)
        assert not session.stats.notes
        assert session.stats.to_dict()["merged_fraction"] > 0
    assert graphs.frame_count > 0


@pytest.mark.parametrize("wrapped", [False, True])
def test_blocks_that_are_compiled_one_by_one_are_not_merged_whole_in_one_part_of_a_run(
    ldm_unet: LdmUNet, wrapped: bool
) -> None:
    """The compiler would leave hooks out that it has once seen do nothing. In the other part they merge as always."""
    config = FIXED.with_(early_modules=("block",))
    with torch.no_grad():
        early, later = (call_ldm(ldm_unet, t=t) for t in (900, 300))
        with merging(ldm_unet, FIXED, branches=("uncond", "cond")):
            merged = call_ldm(ldm_unet, t=300)
        for name, block in [(n, b) for n, b in ldm_unet.named_children() if "attn1" in b._modules]:
            if wrapped:
                setattr(ldm_unet, name, torch.compile(block, backend="eager"))
            else:
                block.compile(backend="eager")
        for _ in range(2):
            with merging(ldm_unet, config, branches=("uncond", "cond")) as session:
                torch.testing.assert_close(call_ldm(ldm_unet, t=900), early)
                torch.testing.assert_close(call_ldm(ldm_unet, t=300), merged, atol=1e-5, rtol=1e-5)
                assert not torch.allclose(merged, later)
            assert len(session.stats.notes) == 1
            assert "compiled one by one" in session.stats.notes[0]


class Wrapper(nn.Module):
    """What k-diffusion's denoisers are: a module around a U-Net."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner_model = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner_model(*args, **kwargs)


def test_guidance_tells_a_compiled_model_too() -> None:
    unet = tiny_unet()
    pictures = []
    for compiled in (False, True):
        with merging(unet, FIXED) as session:
            model = torch.compile(unet, backend="eager", fullgraph=True) if compiled else unet
            found = []
            for sigma, t in ((8.0, 800), (4.0, 600), (0.5, 100)):
                with session.call(ModelCall.chunked(sigma, (16, 16), ("uncond", "cond"), images=1)):
                    out = call(model, t)
                session.observe(out[1:], out[:1])
                found.append(out)
        pictures.append(torch.cat(found))
        assert session.stats.to_dict()["importance_merged"] is not None
        assert [s.sigma for s in session.stats.calls] == [8.0, 4.0, 0.5]
    torch.testing.assert_close(pictures[0], pictures[1], atol=1e-5, rtol=1e-5)


def test_a_model_that_was_compiled_before_says_so_and_afterwards_it_is_as_it_was() -> None:
    unet = tiny_unet()
    compiled = torch.compile(unet, backend="eager")
    plain = call(compiled, 500)
    with merging(unet, FIXED, branches=("uncond", "cond")) as session:
        call(compiled, 500)
        assert any("torch._dynamo.reset()" in note for note in session.stats.notes)
        torch._dynamo.reset()
        session.reset()
        merged = call(compiled, 500)
        assert not torch.equal(merged, plain)
        assert session.stats.to_dict()["merged_fraction"] > 0
        assert not session.stats.notes
    assert torch.equal(call(compiled, 500), plain)


def test_another_size_is_merged_at_its_own_length(ldm_unet: LdmUNet) -> None:
    with merging(ldm_unet, FIXED, branches=("uncond", "cond")):
        eager = [call_ldm(ldm_unet, 500, size=size) for size in (16, 24)]
    with merging(ldm_unet, FIXED, branches=("uncond", "cond")):
        compiled = torch.compile(ldm_unet, backend="eager")
        for size, picture in zip((16, 24), eager, strict=True):
            torch.testing.assert_close(call_ldm(compiled, 500, size=size), picture, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("uncompiled", "small", "dynamic"), [(3, 0, True), (3, 2, None), (3, 2, True), (0, 3, None)])
def test_layers_that_were_left_alone_at_a_small_size_are_merged_at_a_larger_one(
    uncompiled: int, small: int, dynamic: bool | None, ldm_unet: LdmUNet
) -> None:
    """By a graph, too, that was made while they had no hooks; without a break where sizes are symbols."""
    config = FIXED.with_(min_tokens=100)
    with merging(ldm_unet, config, branches=("uncond", "cond")) as session:
        for t in (900, 890, 880)[:uncompiled]:
            call_ldm(ldm_unet, t, size=8)
        compiled = torch.compile(ldm_unet, backend="eager", fullgraph=True, dynamic=dynamic)
        for t in (870, 860, 850)[:small]:
            call_ldm(compiled, t, size=8)
        assert not session.stats.to_dict()["merged_fraction"]
        session.reset()
        pictures = [call_ldm(compiled, t, size=16) for t in (900, 890)]
    with merging(ldm_unet, config, branches=("uncond", "cond")) as session:
        expected = [call_ldm(ldm_unet, t, size=16) for t in (900, 890)]
        assert session.stats.to_dict()["merged_fraction"] > 0
    torch.testing.assert_close(pictures[1], expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("merges", ["fixed", "threshold"])
def test_the_feed_forward_is_halved_in_a_graph_that_merges(merges: str) -> None:
    """And gives the same picture; layers of a coarser level run at once."""
    unet = tiny_unet()
    config = FIXED if merges == "fixed" else MergeConfig(min_tokens=0, floor=0.3)
    seen = watched(unet)
    with merging(unet, config, branches=("uncond", "cond")):
        eager = call(unet, 300)
    uncompiled = seen.copy()
    seen.clear()
    with merging(unet, config, branches=("uncond", "cond")):
        torch.testing.assert_close(call(torch.compile(unet, backend="eager"), 300), eager, atol=1e-5, rtol=1e-5)
    assert seen == uncompiled
    assert {n for lengths in seen.values() for n in lengths} == {128, 64}


@pytest.mark.parametrize("config", [FIXED, MergeConfig(min_tokens=0), FIXED.with_(modules=("block",))])
def test_attention_that_cannot_count_its_keys_is_left_alone_and_this_is_said(config: MergeConfig) -> None:
    unet = tiny_unet()
    for module in unet.modules():
        if hasattr(module, "attn1"):
            module.attn1.norm_q = nn.Identity()  # which our own attention does not know
    plain = call(unet, 500)
    with merging(unet, config, branches=("uncond", "cond")) as session:
        assert torch.equal(call(torch.compile(unet, backend="eager"), 500), plain)
    assert [note for note in session.stats.notes if "cannot count its keys" in note]
    assert session.stats.to_dict()["merged_fraction"] == 0


def test_an_eager_call_after_compiled_ones_is_told_of_by_itself() -> None:
    unet = tiny_unet()
    with merging(unet, FIXED, branches=("uncond", "cond")) as session:
        compiled = torch.compile(unet, backend="eager", fullgraph=True)
        call(compiled, 800)
        call(unet, 600)
        call(unet, 400)
        assert [s.layers != {} for s in session.stats.calls] == [True] * 3
    sigmas = [s.sigma for s in session.stats.calls]
    assert sigmas == sorted(sigmas, reverse=True)
    assert len(set(sigmas)) == 3
    assert not session.stats.notes


def test_the_mark_is_in_a_list_as_torch_before_2_13_takes_no_lone_one() -> None:
    """With a lone one nothing could be imported there."""
    if compiled_hooks.HAS_OPERATORS:
        assert isinstance(compiled_hooks._outside.get("tags", ()), tuple)


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch knows no such mark")
def test_the_compiler_leaves_merging_and_nothing_else_out_of_its_cuda_graphs() -> None:
    unsafe = torch.Tag.cudagraph_unsafe
    left_out: list[str] = []

    def see(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        left_out.extend(str(node.target) for node in graph.graph.nodes if unsafe in getattr(node.target, "tags", ()))
        return graph.forward

    unet = tiny_unet()
    with merging(unet, FIXED, branches=("uncond", "cond")) as session:
        call(torch.compile(unet, backend=see, fullgraph=True), 800)
        layers = len(session.stats.calls[0].layers)
    assert layers
    assert sorted(left_out) == ["tome_sampler.begin.default"] + ["tome_sampler.merge.default"] * layers


def test_a_cuda_graph_is_not_captured_with_a_step_s_decisions_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny_unet()
    plain = call(unet, 800)
    for hooks in (modules, compiled_hooks):
        monkeypatch.setattr(hooks, "is_captured", lambda: True)
    with merging(unet, FIXED, branches=("uncond", "cond")) as session:
        assert torch.equal(call(unet, 800), plain)
        assert [note for note in session.stats.notes if "CUDA graph" in note]
        with pytest.raises(RuntimeError, match=r"torch 2\.9 or newer"):
            call(torch.compile(unet, backend="eager"), 800)


def test_where_the_compiler_takes_no_operators_the_model_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, config = tiny_unet(), MergeConfig(min_tokens=0)
    plain = call(unet, 800)
    with merging(unet, config, branches=("uncond", "cond")):
        eager = [call(unet, t) for t in TIMES[:3]]
    monkeypatch.setattr(modules, "HAS_OPERATORS", False)
    for hooks in (modules, compiled_hooks):
        monkeypatch.setattr(hooks, "is_compiling", lambda: False)
    seen: list[Any] = []

    def see(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        seen.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    with merging(unet, config), merging(unet, config, branches=("uncond", "cond")):
        compiled = torch.compile(unet, backend=see)
        for t, picture in zip(TIMES[:3], eager, strict=True):
            assert torch.equal(call(compiled, t), picture)
    assert nn.functional.scaled_dot_product_attention not in seen
    assert "forward" not in vars(unet)
    assert torch.equal(call(torch.compile(unet, backend=see), 800), plain)
    assert nn.functional.scaled_dot_product_attention in seen


@pytest.mark.skipif(not hasattr(torch.library, "infer_schema"), reason="this torch infers none")
@pytest.mark.parametrize("name", ["begin", "merge", "seen"])
def test_operators_are_told_the_schema_that_their_functions_have(name: str) -> None:
    inferred = torch.library.infer_schema(getattr(compiled_hooks, f"_{name}_op"), mutates_args=())
    assert str(getattr(torch.ops.tome_sampler, name).default._schema) == f"tome_sampler::{name}{inferred}"
