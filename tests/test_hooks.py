"""Host models are hooked, never changed: what leaves no trace, and what must pass through."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from ldm import BasicTransformerBlock, CrossAttention, LdmUNet, Unreachable
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from tome_sampler import MergeConfig, Pairing, apply_patch, merging, remove_patch
from tome_sampler.bench.methods import KeptSession
from tome_sampler.hosts import modules as hosts
from tome_sampler.session import MergeSession, ModelCall

CONFIG = MergeConfig(min_tokens=0)
PRESETS = ("default", "fast", "tomesd", "ca_tome", "importance")
Call = Callable[[nn.Module], Tensor]


def trace(model: nn.Module) -> list[dict[str, Any]]:
    """What each module holds, itself and in its hook dicts; copies, for a comparison later."""
    plain = (dict, OrderedDict, set, list)
    return [{k: copy.copy(v) if type(v) in plain else v for k, v in vars(m).items()} for m in model.modules()]


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, Tensor):
            return x is y
        if isinstance(x, dict):
            return list(x) == list(y) and all(equal(x[k], y[k]) for k in x)
        return x is y or bool(x == y)

    return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))


def call_unet(unet: nn.Module, t: int = 500, b: int = 2, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, context = (torch.randn(shape, generator=generator) for shape in ((b, 4, size, size), (b, 3, 8)))
    with torch.no_grad():
        return unet(x, torch.tensor(t), encoder_hidden_states=context, return_dict=False)[0]


def call_ldm(model: nn.Module, t: int = 500, b: int = 2, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, context = (torch.randn(shape, generator=generator) for shape in ((b, 4, size, size), (b, 3, 8)))
    with torch.no_grad():
        return model(x, torch.full((b,), t), context=context)


@pytest.mark.parametrize("modules", [("attn1",), ("block",)])
def test_a_model_merges_whatever_torch_s_default_precision_is(modules: tuple[str, ...]) -> None:
    model, config = LdmUNet().eval(), CONFIG.with_(modules=modules)
    arguments = torch.randn(2, 4, 8, 8), torch.full((2,), 500)
    context = torch.randn(2, 3, 8)
    with merging(model, config), torch.no_grad():
        expected = model(*arguments, context=context)
    torch.set_default_dtype(torch.float16)
    try:
        with merging(model, config) as session, torch.no_grad():
            assert torch.equal(model(*arguments, context=context), expected)
        assert session.stats.merged
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_model_that_merges_is_not_copied(copied: Callable[[nn.Module], Any]) -> None:
    """Its copy would merge for ever."""
    model = LdmUNet()
    for _ in range(2):
        with (
            merging(model, CONFIG),
            pytest.raises(TypeError, match="merged: remove_patch it first"),
        ):
            copied(model)
        copied(model)


@pytest.fixture(params=["diffusers", "ldm"])
def host(request: pytest.FixtureRequest) -> tuple[nn.Module, Call]:
    if request.param == "diffusers":
        return request.getfixturevalue("unet"), call_unet
    return request.getfixturevalue("ldm_unet"), call_ldm


def test_leaving_restores_bit_for_bit(host: tuple[nn.Module, Call]) -> None:
    model, call = host
    plain, weights, before = call(model), copy.deepcopy(model.state_dict()), trace(model)
    choices = ((("attn1", "attn2", "ff"), None), (("block",), ("ff",)), (("attn1",), ("block",)))
    for preset, (modules, early) in itertools.product(PRESETS, choices):
        config = MergeConfig.preset(preset, min_tokens=0, modules=modules, early_modules=early, floor=0.2)
        with merging(model, config, branches=("uncond", "cond")) as session:
            merged = call(model)
            assert session.stats.to_dict()["merged_fraction"] > 0
            assert not torch.equal(merged, plain)
            assert torch.isfinite(merged).all()
        assert same(before, trace(model))
        assert list(model.state_dict()) == list(weights)
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
        assert torch.equal(call(model), plain)
        assert not hosts._attached


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["attn1", "attn1.to_q", "ff", "merge", "unmerge", "body"])
@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize(
    ("modules", "early", "t"),
    [(("attn1", "ff"), None, 500), (("block",), None, 500), (("attn1",), ("block",), 900), (("block",), ("ff",), 500)],
)
def test_an_exception_or_interrupt_leaves_no_trace(
    host: tuple[nn.Module, Call],
    error: type[BaseException],
    where: str,
    proportional: bool,
    modules: tuple[str, ...],
    early: tuple[str, ...] | None,
    t: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, call = host
    plain = call(model)

    def fail(*args: Any) -> None:
        raise error("on purpose")

    block = next(m for m in model.modules() if hasattr(m, "attn1"))
    own = block.get_submodule(where).register_forward_hook(fail) if where in ("attn1", "attn1.to_q", "ff") else None
    before = trace(model)
    config = CONFIG.with_(proportional=proportional, metric="block", modules=modules, early_modules=early)
    if where in ("merge", "unmerge"):
        monkeypatch.setattr(Pairing, where, fail)
    with pytest.raises(error, match="on purpose"), merging(model, config) as session:
        fail() if where == "body" else call(model, t=t)  # type: ignore[call-arg]
    monkeypatch.undo()
    assert _get_current_function_mode_stack() == []
    assert session.current is None
    assert same(before, trace(model))
    if own is not None:
        own.remove()
    assert torch.equal(call(model), plain)


@pytest.mark.parametrize("name", ["begin", "end", "merge"])
def test_an_error_of_ours_in_a_host_adapters_model_is_told_and_the_model_runs_on(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, errors = LdmUNet().eval().requires_grad_(False), []
    plain = call_ldm(model, size=16)
    session = MergeSession(MergeConfig(ratio=0.5, threshold=None, early_ratio=None, min_tokens=0))

    def failed(error: Exception) -> None:
        session.suspended = True
        errors.append(error)

    def describe(*args: Any) -> ModelCall:
        return ModelCall(1.0, (16, 16), ("cond", "uncond"), (0, 0))

    def broken(*args: Any) -> None:
        raise RuntimeError("a fault put in by the test")

    detach = hosts.attach(model, session, describe, failed)
    merged = call_ldm(model, size=16)
    assert not torch.equal(merged, plain)
    with monkeypatch.context() as patch:
        patch.setattr(session, name, broken)
        assert torch.equal(call_ldm(model, size=16), merged if name == "end" else plain)
    assert {str(error) for error in errors} == {"a fault put in by the test"}
    assert torch.equal(call_ldm(model, size=16), plain)
    detach()
    assert not _get_current_function_mode_stack()
    with merging(model, MergeConfig(min_tokens=0)) as own, monkeypatch.context() as patch:  # the caller's own
        patch.setattr(own, name, broken)
        with pytest.raises(RuntimeError, match="a fault"):
            call_ldm(model, size=16)
    assert torch.equal(call_ldm(model, size=16), plain)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_merging_goes_on_after_a_failed_call(host: tuple[nn.Module, Call], error: type[BaseException]) -> None:
    model, call = host
    with merging(model, CONFIG):
        expected = call(model, t=300)  # type: ignore[call-arg]

    def fail(*args: Any) -> None:
        raise error("on purpose")

    with merging(model, CONFIG) as session:
        own = next(m for m in model.modules() if hasattr(m, "attn1")).attn1.to_k.register_forward_hook(fail)
        with pytest.raises(error):
            call(model)
        own.remove()
        if error is RuntimeError:  # at once; after an interrupt at the next call, or on leaving
            assert _get_current_function_mode_stack() == []
            assert session.current is None
        session.reset()
        assert torch.equal(call(model, t=300), expected)  # type: ignore[call-arg]
        assert _get_current_function_mode_stack() == []


def hooked(model: nn.Module) -> set[str]:
    """Which layers are asked whether to merge; a feed-forward's hooks are there for its memory."""
    parts = {name: m for name, m in model.named_modules() if name and not name.endswith("ff")}
    return {name for name, m in parts.items() if m._forward_pre_hooks or m._forward_hooks}


def test_layers_that_are_left_alone_have_no_hooks_until_they_may_be_wanted(host: tuple[nn.Module, Call]) -> None:
    """A coarse level, and at a small size all of them; at another size and in another run they are asked again."""
    model, call = host
    before, config = trace(model), MergeConfig(min_tokens=100)
    with merging(model, config) as session:
        everywhere = hooked(model)
        call(model, t=500, size=16)  # type: ignore[call-arg]
        assert hooked(model) == everywhere
        call(model, t=400, size=16)  # type: ignore[call-arg]
        finest = hooked(model)
        assert finest < everywhere  # the level of 64 tokens rests
        assert {name for call in session.stats.calls for name in call.layers} == finest
        for t in (300, 290):
            call(model, t=t, size=8)  # type: ignore[call-arg]
        assert not hooked(model)
        assert torch.equal(call(model, t=280, size=8), call(model, t=280, size=8))  # type: ignore[call-arg]
        merged = call(model, t=200, size=16)  # type: ignore[call-arg]
        assert hooked(model) == everywhere
        for _ in range(2):
            call(model, t=200, size=8)  # type: ignore[call-arg]
        assert not hooked(model)
        session.reset()
        call(model, t=500, size=8)  # type: ignore[call-arg]
        assert hooked(model) == everywhere
    with merging(model, config):
        assert torch.equal(call(model, t=200, size=16), merged)  # type: ignore[call-arg]
    assert same(before, trace(model))


def test_a_session_that_comes_back_hooks_only_what_it_merges(host: tuple[nn.Module, Call]) -> None:
    """As in bench, where methods are put on and taken off in turn."""
    model, call = host
    session = KeptSession(MergeConfig(min_tokens=100))
    before, seen = trace(model), []
    for size in (16, 16, 8, 8):
        with hosts.attached(model, session):
            seen.append(hooked(model))
            call(model, size=size)  # type: ignore[call-arg]
            seen.append(hooked(model))
        assert same(before, trace(model))
    everywhere, _, finest, again, *rest = seen
    assert finest == again == rest[0] < everywhere
    assert rest[1] == everywhere  # the other size
    assert not rest[2]


def test_an_attachment_is_gone_with_its_hooks(host: tuple[nn.Module, Call]) -> None:
    """At once, not when garbage is next collected: a compiled graph must not find it."""
    model, call = host
    gc.collect()
    gc.disable()
    try:
        with merging(model, MergeConfig(min_tokens=100)):
            for _ in range(3):
                call(model)
            compiled = weakref.ref(hosts._attached[model][-1]._compiled)
        assert compiled() is None
    finally:
        gc.enable()


def test_an_interrupted_call_puts_nothing_to_rest(host: tuple[nn.Module, Call]) -> None:
    model, call = host

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with merging(model, MergeConfig(min_tokens=100)):
        everywhere = hooked(model)
        call(model, t=500, size=8)  # type: ignore[call-arg]
        own = model.register_forward_hook(interrupt)
        model._forward_hooks.move_to_end(own.id, last=False)  # before ours
        with pytest.raises(KeyboardInterrupt):
            call(model, t=400, size=8)  # type: ignore[call-arg]
        own.remove()
        call(model, t=300, size=16)  # type: ignore[call-arg]
        assert hooked(model) == everywhere


def test_without_a_known_size_every_layer_is_asked_each_time() -> None:
    """As nothing would tell when it is to be asked again."""
    block, context = BasicTransformerBlock(16, 8).eval(), torch.randn(2, 3, 8)
    with torch.no_grad(), merging(block, MergeConfig(min_tokens=100)) as session:
        for _ in range(3):
            block(torch.randn(2, 64, 16), context)
        block(torch.randn(2, 144, 16), context)
    assert session.stats.to_dict()["merged_fraction"] > 0


def test_nested_and_repeated_merging_counts_once(host: tuple[nn.Module, Call]) -> None:
    model, call = host
    plain, before = call(model), trace(model)
    with merging(model, CONFIG):
        default = call(model)
    with merging(model, MergeConfig.preset("tomesd")):
        tomesd = call(model)
    with merging(model, CONFIG) as outer:
        with merging(model, CONFIG) as inner:
            assert torch.equal(call(model), default)
            assert not outer.stats.calls
        with merging(model, MergeConfig.preset("tomesd")):
            assert torch.equal(call(model), tomesd)
        assert torch.equal(call(model), default)
        assert len(inner.stats.calls) == len(outer.stats.calls) == 1
    assert same(before, trace(model))
    assert torch.equal(call(model), plain)


def test_patches_are_undone_last_first_and_a_model_without_is_left_alone(host: tuple[nn.Module, Call]) -> None:
    model, call = host
    plain, before = call(model), trace(model)
    assert remove_patch(model) is model
    apply_patch(model, MergeConfig.preset("tomesd"))
    tomesd = call(model)
    apply_patch(model, CONFIG)
    assert not torch.equal(call(model), tomesd)
    remove_patch(model)
    remove_patch_sees = call(model, t=499)  # type: ignore[call-arg]
    assert remove_patch_sees.shape == tomesd.shape
    remove_patch(model)
    assert same(before, trace(model))
    assert torch.equal(call(model), plain)


def test_a_ratio_of_0_and_a_time_that_is_over_change_not_one_bit(host: tuple[nn.Module, Call]) -> None:
    model, call = host
    plain = call(model)
    for config in (
        CONFIG.with_(ratio=0.0),
        CONFIG.with_(end=0.0),
        CONFIG.with_(start=1.0),
        CONFIG.with_(min_tokens=999),
    ):
        with merging(model, config):
            assert torch.equal(call(model), plain)


def test_a_model_with_nothing_to_merge_says_what_was_looked_for_and_stays_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    before = trace(model)
    with pytest.raises(ValueError, match=r"Sequential has nothing to merge.*'attn1'"), merging(model):
        pass
    assert same(before, trace(model))
    with pytest.raises(ValueError, match="not a torch module"):
        apply_patch(object())
    with pytest.raises(ValueError, match="it must be a MergeConfig"):
        apply_patch(LdmUNet(), {"ratio": 0.5})  # type: ignore[arg-type]
    assert not hosts._attached


def test_a_pipeline_is_patched_at_its_unet(unet: nn.Module) -> None:
    class Pipeline:
        def __init__(self) -> None:
            self.unet = unet

    with merging(Pipeline(), CONFIG) as session:
        call_unet(unet)
    assert session.stats.to_dict()["merged_fraction"] > 0


def test_one_block_alone_merges_square_grids_without_being_told_of_calls() -> None:
    block, x = BasicTransformerBlock(16, 8).eval(), torch.randn(2, 64, 16)
    context = torch.randn(2, 3, 8)
    with torch.no_grad(), merging(block, CONFIG) as session:
        merged = block(x, context)
        assert torch.equal(block(x[:, :60], context), block(x[:, :60], context))
    assert merged.shape == x.shape
    stats = session.stats.to_dict()
    assert stats["merged_fraction"] >= 0.18
    assert stats["notes"] == ["60 tokens are not the grid of a square latent: passed through"]


def test_attention_with_another_context_or_a_mask_passes_through() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn1 = CrossAttention(16)

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return self.attn1(*args, **kwargs)

    block, x = Block().eval(), torch.randn(1, 64, 16)
    other, mask = torch.randn(1, 64, 16), torch.rand(1, 64) > 0.1
    with torch.no_grad():
        for args, kwargs in (
            ((x, other), {}),
            ((x,), {"context": other}),
            ((x,), {"mask": mask}),
            ((), {"x": x, "mask": mask}),
        ):
            plain = block(*args, **kwargs)
            with merging(block, CONFIG) as session:
                assert torch.equal(block(*args, **kwargs), plain)
            assert not session.stats.to_dict()["layers"]
        plain = block(x)
        for args, kwargs in [((x,), {}), ((), {"x": x}), ((x,), {"context": None, "mask": None})]:
            with merging(block, CONFIG) as session:
                assert (block(*args, **kwargs) - plain).abs().max() < 1
            assert session.stats.to_dict()["layers"]["attn1"]["tokens_after"] < 64
        with merging(block, CONFIG):  # its own tokens given once more as context: all keys
            assert (block(x, x) - plain).abs().max() < 1


@pytest.mark.parametrize("proportional", [True, False])
def test_an_image_comes_out_alike_alone_and_in_a_batch(host: tuple[nn.Module, Call], proportional: bool) -> None:
    model, _ = host
    config = CONFIG.with_(proportional=proportional, floor=0.0, threshold=0.7)
    x = torch.randn(3, 4, 8, 8) * torch.tensor([1.0, 0.1, 0.01])[:, None, None, None] + torch.randn(3, 4, 1, 1)
    context = torch.randn(6, 3, 8)
    kwargs = {"return_dict": False} if hasattr(model, "config") else {}

    def call(rows: list[int]) -> tuple[Tensor, Any]:
        with torch.no_grad(), merging(model, config, branches=("uncond", "cond")) as session:
            out = model(x.repeat(2, 1, 1, 1)[rows], torch.full((len(rows),), 500), context[rows], **kwargs)
            return (out[0] if kwargs else out), {p.size.eq(0).any().item() for p in session.pairings().values()}

    batch, ragged = call([*range(6)])
    assert True in ragged  # rows of different lengths, so padding to look away from
    for image in range(3):
        torch.testing.assert_close(call([image, 3 + image])[0], batch[[image, 3 + image]], atol=1e-5, rtol=1e-4)


def test_a_batch_that_is_not_the_calls_passes_through_and_says_so(ldm_unet: LdmUNet) -> None:
    from tome_sampler import ModelCall

    plain = call_ldm(ldm_unet, b=3)
    with merging(ldm_unet, CONFIG) as session, session.call(ModelCall(1.0, (8, 8), ("cond",) * 2, (0, 1))):
        assert torch.equal(call_ldm(ldm_unet, b=3), plain)
    assert session.stats.notes == ["a batch of 3 rows where the model call told of 2: passed through"]
    with merging(ldm_unet, CONFIG, branches=("uncond", "cond")) as session:  # 3 rows are not two equal chunks
        assert not torch.equal(call_ldm(ldm_unet, b=3), plain)


def test_two_models_at_once_do_not_see_each_other(unet: nn.Module, ldm_unet: LdmUNet) -> None:
    with merging(unet, CONFIG):
        first = call_unet(unet)
    with merging(ldm_unet, CONFIG):
        second = call_ldm(ldm_unet)
    with merging(unet, CONFIG) as a, merging(ldm_unet, CONFIG) as b:
        assert torch.equal(call_unet(unet), first)
        assert torch.equal(call_ldm(ldm_unet), second)
        assert len(a.stats.calls) == len(b.stats.calls) == 1
    plain = call_ldm(ldm_unet)
    with merging(unet, CONFIG):
        assert torch.equal(call_ldm(ldm_unet), plain)


class Blocks(nn.Module):
    """A model that is two transformer blocks of ldm on a grid of 8x8 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([BasicTransformerBlock(16, 8), BasicTransformerBlock(16, 8)])

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens, context)
        return tokens


class InPlaceBlock(BasicTransformerBlock):
    """Adds to the tokens that it is given, as ComfyUI's and Forge's do."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x += self.attn1(self.norm1(x))
        x += self.attn2(self.norm2(x), context=context)
        return self.ff(self.norm3(x)).add_(x)


@pytest.mark.parametrize("ratio", [0.75, 0.6])
@pytest.mark.parametrize("kind", ["usual", "unreached", "in place", "compiled"])
def test_blocks_on_merged_duplicates_are_exact(ratio: float, kind: str) -> None:
    model: nn.Module = Blocks().eval()
    for number, block in enumerate(model.blocks):  # type: ignore[arg-type]
        if kind == "unreached":
            block.attn1 = Unreachable(16)
        if kind in ("in place", "compiled"):
            model.blocks[number] = InPlaceBlock(16, 8).eval()  # type: ignore[index]
    run = torch.compile(model, backend="eager") if kind == "compiled" else model
    x = torch.randn(2, 16, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)  # each 2x2 cell is one token
    context, t = torch.randn(2, 3, 8), torch.tensor(500)
    error = {}
    for proportional in (True, False):
        config = CONFIG.with_(modules=("block",), ratio=ratio, threshold=None, proportional=proportional)
        with torch.no_grad():
            exact = model(x.clone(), t, context)
            with merging(model, config, branches=("uncond", "cond")) as session:
                error[proportional] = (run(x.clone(), t, context) - exact).abs().max().item()
        torch._dynamo.reset()
        assert session.stats.to_dict()["merged_fraction"] == pytest.approx(ratio, abs=0.02)
        assert not session.stats.notes
    assert error[True] < 1e-4
    assert (error[False] > 1e-3) == (ratio != 0.75)  # groups of one size need no counting


def test_all_of_a_block_runs_on_merged_tokens_and_each_token_keeps_what_is_its_own(ldm_unet: LdmUNet) -> None:
    seen: dict[str, int] = {}
    block = next(m for m in ldm_unet.modules() if hasattr(m, "attn1"))
    for name in ("attn1", "attn2", "ff"):
        block.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: seen.update({name: out.shape[1]})
        )
    ends: list[Tensor] = []
    config = CONFIG.with_(modules=("block",), threshold=None, ratio=0.5)
    with merging(ldm_unet, config):
        handle = block.register_forward_hook(lambda m, args, out: ends.append(out))  # after ours: what the model gets
        call_ldm(ldm_unet)
        handle.remove()
    assert seen == {"attn1": 32, "attn2": 32, "ff": 32}
    assert ends[0].shape[1] == 64
    assert len(ends[0][0].unique(dim=0)) == 64  # no two tokens have become one


@pytest.mark.parametrize("threshold", [None, 0.9])
@pytest.mark.parametrize(
    ("modules", "early", "merged"),
    [
        (("attn1",), ("block",), {"attn1", "attn2", "ff"}),
        (("attn1",), ("attn2", "ff"), {"attn2", "ff"}),
        (("block",), ("attn1",), {"attn1"}),
    ],
)
def test_the_early_part_merges_in_modules_of_its_own(
    ldm_unet: LdmUNet, modules: tuple[str, ...], early: tuple[str, ...], merged: set[str], threshold: float | None
) -> None:
    """Each part of a run gives the very tokens of a run that merges so throughout."""
    config = CONFIG.with_(modules=modules, early_modules=early, threshold=threshold)
    alone = {}
    for t, those in ((900, early), (300, modules)):
        with merging(ldm_unet, config.with_(modules=those, early_modules=None), branches=("uncond", "cond")):
            alone[t] = call_ldm(ldm_unet, t=t)
    block = next(m for m in ldm_unet.modules() if hasattr(m, "attn1"))
    seen: dict[str, set[int]] = {name: set() for name in ("attn1", "attn2", "ff")}
    for name, lengths in seen.items():
        layer = block.get_submodule(name)

        def forward(x: Tensor, *rest: Any, lengths: set[int] = lengths, inner: Any = layer.forward, **more: Any) -> Any:
            lengths.add(x.shape[1])
            return inner(x, *rest, **more)

        layer.forward = forward  # type: ignore[method-assign]
    with merging(ldm_unet, config, branches=("uncond", "cond")) as session:
        assert torch.equal(call_ldm(ldm_unet, t=900), alone[900])
        assert {name for name, lengths in seen.items() if lengths == {16}} == merged  # a quarter of 64
        call_ldm(ldm_unet, t=890)
        assert torch.equal(call_ldm(ldm_unet, t=300), alone[300])
    assert session.stats.to_dict()["pairings_made"] == 2 * 2  # each block in each part
    assert not session.stats.notes


def test_what_replaces_a_projection_acts_on_merged_tokens(unet: nn.Module) -> None:
    class Lora(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.seen = inner, []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x.shape[1])
            return self.inner(x) * 3

    with merging(unet, CONFIG):
        without = call_unet(unet)
    attention = next(m for m in unet.modules() if hasattr(m, "attn1")).attn1
    with merging(unet, CONFIG) as session:
        attention.to_q = Lora(attention.to_q)  # while merging, as a LoRA loads
        assert not torch.equal(call_unet(unet), without)
        assert max(attention.to_q.seen) < 256
    assert isinstance(attention.to_q, Lora)  # ours is undone, theirs stays
    assert session.stats.to_dict()["merged_fraction"] > 0


def test_a_call_by_keywords_is_a_call_by_position(unet: nn.Module) -> None:
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 3, 8)
    with torch.no_grad():
        with merging(unet, CONFIG, branches=("uncond", "cond")):
            by_position = unet(x, 500, context).sample
        with merging(unet, CONFIG, branches=("uncond", "cond")):
            by_keywords = unet(sample=x, timestep=torch.tensor(500), encoder_hidden_states=context).sample
    assert torch.equal(by_position, by_keywords)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("preset", ["default", "tomesd"])
def test_a_model_in_half_precision_stays_in_it(ldm_unet: LdmUNet, dtype: torch.dtype, preset: str) -> None:
    ldm_unet.to(dtype)
    x = torch.randn(2, 4, 8, 8).to(dtype)
    with torch.no_grad(), merging(ldm_unet, MergeConfig.preset(preset, min_tokens=0)) as session:
        out = ldm_unet(x, torch.full((2,), 500).to(dtype), torch.randn(2, 3, 8).to(dtype))
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    assert session.stats.to_dict()["merged_fraction"] >= 0.18


def test_gradients_flow_through_merged_layers_and_inference_mode_works(ldm_unet: LdmUNet) -> None:
    x, context = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 3, 8)
    with merging(ldm_unet, CONFIG) as session:
        ldm_unet(x, torch.full((2,), 500), context).square().sum().backward()
        session.reset()
        with torch.inference_mode():
            ldm_unet(x, torch.full((2,), 500), context)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert (x.grad != 0).all()


def test_a_forward_set_on_an_instance_still_runs(ldm_unet: LdmUNet) -> None:
    block = ldm_unet.first
    assert block is not None
    original, ran = block.forward, []
    block.forward = lambda *args, **kwargs: (ran.append(1), original(*args, **kwargs))[1]  # as reference-only control
    with merging(ldm_unet, CONFIG) as session:
        call_ldm(ldm_unet)
    assert ran == [1]
    assert (
        session.stats.to_dict()["layers"]["first.attn1"]["tokens_after"]
        < session.stats.to_dict()["layers"]["first.attn1"]["tokens_before"]
    )


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


@pytest.mark.parametrize("preset", ["default", "tomesd", "importance"])
def test_no_tensor_is_kept_after_leaving(
    host: tuple[nn.Module, Call], preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, call = host
    seen: list[weakref.ref[Tensor]] = []
    config = MergeConfig.preset(preset, min_tokens=0, metric="block")
    with merging(model, config) as session:
        original = session.merge

        def spy(layer: Any, x: Tensor, metric: Tensor | None = None) -> Pairing | None:
            pairing = original(layer, x, metric)
            seen.extend(weakref.ref(t) for t in (x, metric, *(() if pairing is None else (pairing.row, pairing.size))))
            return pairing

        monkeypatch.setattr(session, "merge", spy)
        call(model)
        session.observe(torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16))
        seen.append(weakref.ref(session.importance))
    gc.collect()
    assert len(seen) > 4
    assert all(ref() is None for ref in seen)


@pytest.mark.parametrize("way", ["merging", "apply_patch", "interrupted"])
def test_a_model_can_be_collected(way: str) -> None:
    model = LdmUNet().eval()
    reference = weakref.ref(model)
    tensors = live_tensors()
    if way == "merging":
        with merging(model, CONFIG):
            call_ldm(model)
    else:
        apply_patch(model, CONFIG)
        if way == "interrupted":
            model.first.attn1.to_k.register_forward_hook(_interrupt)
            with pytest.raises(KeyboardInterrupt):
                call_ldm(model)
            remove_patch(model)
        else:
            call_ldm(model)
    del model
    gc.collect()
    assert reference() is None
    assert live_tensors() <= tensors
    assert not hosts._attached


def _interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


def test_a_context_that_is_the_input_itself_is_merged_with_it(ldm_unet: nn.Module) -> None:
    """Some hosts call attn1(x, context=x): keys must be merged as queries are, not left in full."""
    block = next(m for m in ldm_unet.modules() if hasattr(m, "attn1"))
    x = torch.randn(2, 64, block.attn1.to_q.in_features, generator=torch.Generator().manual_seed(0))
    with merging(block, MergeConfig(threshold=None, min_tokens=0)):
        assert torch.equal(block.attn1(x, context=x), block.attn1(x))


class Attentive(nn.Module):
    """A block whose second attention has no context either, as of diffusers' `double_self_attention`."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(16), CrossAttention(16)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = x + self.attn1(x, mask=attention_mask)
        return x + self.attn2(x)


@pytest.mark.parametrize("modules", [("attn2",), ("attn1", "attn2"), ("block",)])
def test_padding_is_not_seen_by_a_second_self_attention(modules: tuple[str, ...]) -> None:
    block = Attentive().eval()
    rough = torch.tensor([0.02, 3.0])[:, None, None]
    x = torch.randn(2, 1, 16) + rough * torch.randn(2, 64, 16)
    config = MergeConfig(modules=modules, min_tokens=0, floor=0.0, ratio=0.7, threshold=0.9)
    with torch.no_grad(), merging(block, config) as session:
        both = block(x)
        assert any((p.size == 0).any() for p in session.pairings().values())
    with torch.no_grad(), merging(block, config):
        torch.testing.assert_close(block(x[1:]), both[1:], atol=1e-5, rtol=1e-5)


class OwnKernel(Unreachable):
    """Such attention, that nothing of ours can stand in for either."""

    processor = object()


@pytest.mark.parametrize("modules", [("attn1",), ("block",)])
def test_attention_that_sees_padding_is_run_on_all_tokens_and_says_so(modules: tuple[str, ...]) -> None:
    unet = LdmUNet().eval().requires_grad_(False)
    for block in (unet.first, unet.deep, unet.last):
        attention = OwnKernel(16).requires_grad_(False)
        attention.load_state_dict(block.attn1.state_dict())
        block.attn1 = attention
    rough, smooth = 3 * torch.randn(1, 4, 16, 16), 0.1 * torch.randn(1, 4, 1, 1).expand(-1, -1, 16, 16)
    context = torch.randn(1, 3, 8)
    config = CONFIG.with_(early_ratio=None, ratio=0.75, threshold=0.99, floor=0.0, modules=modules)

    def run(*images: Tensor) -> Tensor:
        x = torch.cat(images)
        return unet(x, torch.full((len(x),), 500.0), context=context.expand(len(x), -1, -1))

    plain = run(rough, smooth)
    with merging(unet, config) as session:
        run(smooth)
        assert session.stats.to_dict()["merged_fraction"] > 0.5  # a picture alone has no padding
    with merging(unet, config) as session:
        for _ in range(2):  # the second time it is known before
            torch.testing.assert_close(run(rough, smooth), plain, atol=1e-4, rtol=1e-4)
        assert not session.stats.calls[-1].layers
        assert session.stats.to_dict()["merged_fraction"] == 0
        assert any("images that merge different counts" in note for note in session.stats.notes)
    with merging(unet, config.with_(batch_rule="max")) as session:
        assert not torch.equal(run(rough, smooth), plain)
        assert any("count once each" in note for note in session.stats.notes)


def test_a_block_with_a_mask_for_all_tokens_passes_through() -> None:
    block, x = Attentive().eval(), torch.randn(1, 64, 16)
    mask = torch.ones(1, 64, dtype=torch.bool)
    with torch.no_grad():
        plain = block(x, attention_mask=mask)
        with merging(block, CONFIG.with_(modules=("block",))) as session:
            assert torch.equal(block(x, attention_mask=mask), plain)
    assert not session.stats.to_dict()["layers"]


def test_attention_that_returns_more_than_tokens_is_unmerged() -> None:
    class Weighted(CrossAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs), "weights"

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn1 = Weighted(16)

        def forward(self, x: Tensor) -> Any:
            return self.attn1(x)

    with torch.no_grad(), merging(Block().eval(), CONFIG.with_(threshold=None, early_ratio=None)) as session:
        out, more = next(iter(hosts._attached))(torch.randn(1, 64, 16))
    assert out.shape == (1, 64, 16)
    assert more == "weights"
    assert session.stats.to_dict()["merged_fraction"] == 0.5


def test_all_that_waited_for_a_session_goes_on_after_it() -> None:
    blocks = nn.ModuleList([BasicTransformerBlock(16, 8), BasicTransformerBlock(16, 8)]).eval()
    with merging(blocks[0], CONFIG) as first, merging(blocks[1], CONFIG) as second:
        with merging(blocks, CONFIG):
            assert first.suspended
            assert second.suspended
        assert not first.suspended
        assert not second.suspended


def test_sessions_may_be_taken_off_in_any_order(ldm_unet: LdmUNet) -> None:
    with ExitStack() as outer, ExitStack() as middle, ExitStack() as inner:
        sessions = [stack.enter_context(merging(ldm_unet, CONFIG)) for stack in (outer, middle, inner)]
        middle.close()
        assert [s.suspended for s in sessions] == [True, True, False]
        inner.close()
        assert not sessions[0].suspended


def test_a_time_is_known_by_its_name_or_by_its_shape() -> None:
    x, text, t = torch.zeros(2, 4, 8, 8), torch.zeros(2, 5, 16), torch.tensor([300, 300])
    for args, kwargs in (((x, t), {}), ((x, text), {"timestep": t}), ((x,), {"timestep": 300}), ((x, 300, text), {})):
        assert hosts._latent_and_time(args, kwargs)[1] is not text
        assert int(torch.as_tensor(hosts._latent_and_time(args, kwargs)[1]).max()) == 300
    assert hosts._latent_and_time((x, text), {})[1] is None


def test_a_model_that_is_called_directly_is_at_the_noise_level_of_its_timestep(unet: nn.Module) -> None:
    kept = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    with merging(unet, CONFIG) as session:
        for t in (999, 500, 0):
            call_unet(unet, t)
    sigmas = [call.sigma for call in session.stats.calls]
    assert sigmas == pytest.approx([float(((1 - kept[t]) / kept[t]) ** 0.5) for t in (999, 500, 0)], rel=1e-6)
