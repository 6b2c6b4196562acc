"""The extension in a stand-in for its hosts, with small real U-Nets."""

from __future__ import annotations

import gc
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_feedforward import watched
from torch import Tensor, nn
from webui import (
    A1111,
    Forge,
    ForgeUNet,
    Host,
    Interrupted,
    Processing,
    UnetPatcher,
    attention_function,
    clean_modules,
)

from tome_sampler.config import MergeConfig
from tome_sampler.hosts.a1111 import A1111Pass
from tome_sampler.hosts.forge import ForgePass
from tome_sampler.matching import global_match
from tome_sampler.pairing import Pairing
from tome_sampler.session import MergeSession

ON = {"enabled": True, "preset": "tomesd"}
FAST = {"enabled": True, "preset": "balanced", "ratio": 0.5, "threshold": None, "early_ratio": None, "min_tokens": 0}


@pytest.fixture(params=["a1111", "forge"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    """Each of the two hosts with the extension loaded."""
    with clean_modules():
        found: Host = A1111() if request.param == "a1111" else Forge()
        found.install(tmp_path)
        found.load()
        yield found


@pytest.fixture
def a1111(tmp_path: Path) -> Iterator[A1111]:
    with clean_modules():
        found = A1111()
        found.install(tmp_path)
        found.load()
        yield found


@pytest.fixture
def forge(tmp_path: Path) -> Iterator[Forge]:
    with clean_modules():
        found = Forge()
        found.install(tmp_path)
        found.load()
        yield found


def unet_of(host: Host) -> nn.Module:
    model = host.shared.sd_model
    unet: nn.Module = host.clean.model.diffusion_model if isinstance(host, Forge) else model.model.diffusion_model
    return unet


def hooks_on(module: nn.Module) -> int:
    return sum(
        len(getattr(part, name)) for part in module.modules() for name in ("_forward_hooks", "_forward_pre_hooks")
    )


def last(host: Host) -> dict[str, Any]:
    return host.app.run.record.to_dict()


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def test_off_and_ratio_zero_are_the_plain_picture_bit_for_bit(host: Host) -> None:
    plain, params = host.generate([])
    assert params == {}
    for args in ([False], [{"enabled": False}], [True, "Off"], [{**FAST, "ratio": 0, "early_ratio": 0.75}]):
        picture, _ = host.generate(args)
        assert same(plain, picture), args
    assert not host.errors


def test_on_merges_reproducibly_and_writes_the_infotext(host: Host) -> None:
    plain, _ = host.generate([])
    merged, params = host.generate([FAST])
    assert not same(plain, merged)
    assert same(merged, host.generate([FAST])[0])
    assert params["ToMe Sampler"] == "Balanced"
    assert params["ToMe threshold"] == "off"
    found = last(host)
    assert found["stood_aside"] is None
    assert found["passes"][0]["statistics"]["merged_fraction"] == pytest.approx(0.5)
    assert found["passes"][0]["statistics"]["importance_merged"] is not None
    assert hooks_on(unet_of(host)) == 0
    assert same(plain, host.generate([])[0])
    assert not host.errors


def test_the_early_part_is_merged_by_its_own_ratio(host: Host) -> None:
    def shares(**fields: Any) -> list[tuple[bool, float]]:
        host.generate([{**FAST, "early_sigma": 3.0, **fields}])
        steps = last(host)["passes"][0]["statistics"]["steps"]
        found = [(step["sigma"] > 3, layer) for step in steps for layer in step["layers"].values()]
        assert {early for early, _ in found} == {True, False}
        return [(early, 1 - layer["tokens_after"] / layer["tokens_before"]) for early, layer in found]

    for ratio in (0.9, 0.25, 0.0):
        for early, share in shares(early_ratio=ratio):
            assert share == pytest.approx(ratio if early else 0.5, abs=1e-3), early
    for early, share in shares(early_ratio=0.75, threshold=1.0, floor=0.125):
        assert share == pytest.approx(0.75 if early else 0.125, abs=1e-3), early
    assert all(share == pytest.approx(0.5) for _, share in shares())
    _, params = host.generate([{**FAST, "early_ratio": 0.9, "early_sigma": 2.0}])
    assert (params["ToMe early ratio"], params["ToMe early sigma"]) == ("0.9", "2")
    assert "ToMe early ratio" not in host.generate([{"preset": "fast"}])[1]
    assert not host.errors


def test_an_image_is_the_same_alone_and_in_a_batch(host: Host) -> None:
    args = [{**FAST, "threshold": 0.5, "floor": 0.2}]
    pair, _ = host.generate(args, batch_size=2)
    alone, _ = host.generate(args)
    torch.testing.assert_close(pair[:1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", ["Euler", "Heun", "Restart"])
@pytest.mark.parametrize("batch", [1, 3])
def test_samplers_batches_and_several_conds(host: Host, sampler: str, batch: int) -> None:
    for conds in (1, 2):
        host.generate([FAST], sampler=sampler, batch_size=batch, conds=conds, n_iter=2)
        statistics = last(host)["passes"]
        assert len(statistics) == 2
        assert all(p["statistics"]["merged_fraction"] == pytest.approx(0.5) for p in statistics)
    assert not host.errors


def test_hires_has_its_own_settings_and_a_pass_of_its_own(host: Host) -> None:
    _, params = host.generate([{**FAST, "hires": {"ratio": 0.25}}], enable_hr=True)
    first, second = last(host)["passes"]
    assert (first["hires"], second["hires"]) == (False, True)
    assert first["statistics"]["merged_fraction"] == pytest.approx(0.5)
    assert second["statistics"]["merged_fraction"] == pytest.approx(0.25)
    assert params["ToMe hires ratio"] == "0.25"
    host.generate([{**FAST, "hires": "off"}], enable_hr=True)
    assert [p["hires"] for p in last(host)["passes"]] == [False]
    host.generate([{"preset": "off", "hires": {"preset": "fast", "min_tokens": 0}}], enable_hr=True)
    assert [p["hires"] for p in last(host)["passes"]] == [True]
    assert not host.errors


@pytest.mark.parametrize("hires", [False, True])
def test_where_one_pass_stands_aside_the_other_is_merged_and_told_of(host: Host, hires: bool) -> None:
    host.shared.opts.data["token_merging_ratio_hr" if hires else "token_merging_ratio"] = 0.3
    args = [{**FAST, "hires": {"ratio": 0.25}}]
    _, params = host.generate(args, enable_hr=True, n_iter=2)
    reason = "the host's own token merging is on (ratio 0.3); set it to 0 in the settings to use this one"
    name = "Hires pass" if hires else "First pass"
    assert params.pop(f"ToMe {name.lower()}") == f"stood aside: {reason}"
    found = last(host)
    assert found["stood_aside"] is None
    assert [one["stood_aside"] for one in found["passes"]] == [None, reason] * 2 if hires else [reason, None] * 2
    shares = [0.5, 0.0] * 2 if hires else [0.0, 0.25] * 2
    assert [one["statistics"]["merged_fraction"] for one in found["passes"]] == pytest.approx(shares)
    assert "of the tokens merged" in found["summary"]
    assert found["summary"].endswith(f". {name} stood aside: {reason}.")
    assert f"Stood aside: {reason}".replace("'", "&#x27;") in host.app.tab.report_html(host.app.run.record)
    host.shared.opts.data.clear()
    assert params == host.generate(args, enable_hr=True)[1]
    host.shared.opts.data |= {"token_merging_ratio_hr": 0.3, "token_merging_ratio": 0.2}
    _, params = host.generate(args, enable_hr=True)
    assert list(params) == ["ToMe Sampler"]
    assert "(ratio 0.2)" in params["ToMe Sampler"]
    assert "(ratio 0.3)" in params["ToMe Sampler"]
    assert params["ToMe Sampler"] == f"stood aside: {last(host)['stood_aside']}"
    assert not host.errors


def test_a1111_row_layouts(a1111: A1111) -> None:
    def fraction() -> float:
        return float(last(a1111)["passes"][0]["statistics"]["merged_fraction"])

    whole, _ = a1111.generate([FAST], batch_size=2)
    a1111.batch_cond_uncond = False
    parts, _ = a1111.generate([FAST], batch_size=2)
    torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-3)
    for settings in ({"lengths_differ": True}, {"conds": 2, "batch_size": 2}, {"conds": 3}, {"edit": True}):
        a1111.generate([FAST], **settings)
        assert fraction() == pytest.approx(0.5), settings
    a1111.batch_cond_uncond = True
    a1111.generate([FAST], edit=True)
    assert fraction() == pytest.approx(0.5)
    a1111.skip_uncond_at = {1, 3}
    a1111.generate([FAST])
    assert fraction() == pytest.approx(0.5)
    a1111.eps_valued = True
    a1111.skip_uncond_at = set()
    a1111.generate([FAST])
    steps = last(a1111)["passes"][0]["statistics"]["steps"]
    assert steps[0]["sigma"] > 10
    assert steps[-1]["sigma"] < 0.2
    assert not a1111.errors


def test_a1111_refiner_swaps_the_model_inside_sampling(a1111: A1111) -> None:
    first, second = a1111.shared.sd_model, a1111.model()

    def swap(call: int) -> None:
        if call == 1:  # itself still of the first
            a1111.modules.shared.sd_model = a1111.shared.sd_model = second

    a1111.model_calls.clear()
    a1111.fault = swap
    a1111.generate([FAST])
    steps = last(a1111)["passes"][0]["statistics"]["steps"]
    assert len(steps) == 4
    assert all(step["layers"] and step["merged_fraction"] == pytest.approx(0.5) for step in steps)
    assert steps[2]["pairings_made"] > 0  # pairs of the first model are not used on
    assert any(one.sigma == steps[2]["sigma"] for one in a1111.app.run.record.passes[0].maps)
    assert hooks_on(first.model.diffusion_model) == hooks_on(second.model.diffusion_model) == 0
    assert not a1111.errors


def test_a1111_what_another_script_generates_between_passes_is_plain(a1111: A1111) -> None:
    hook, inner = a1111.hook, []

    def own() -> Tensor:
        """A processing of which none of our hooks is told."""
        a1111.hook = lambda *args, **kwargs: None  # type: ignore[method-assign]
        try:
            return a1111.sample(Processing(a1111, [], seed=7))
        finally:
            a1111.hook = hook  # type: ignore[method-assign]

    def before_second(name: str, p: Any, *args: Any, **kwargs: Any) -> None:
        if name == "process_before_every_sampling" and p.is_hr_pass:
            inner.append(own())
        hook(name, p, *args, **kwargs)

    alone = own()
    expected, _ = a1111.generate([FAST], enable_hr=True)
    a1111.hook = before_second  # type: ignore[method-assign]
    found, _ = a1111.generate([FAST], enable_hr=True)
    assert same(inner[0], alone)
    assert same(found, expected)
    assert not a1111.errors


def test_a1111_importance_of_several_conds_is_of_their_mean(a1111: A1111, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(MergeSession, "observe", lambda self, cond, uncond: seen.append((cond, uncond)))
    work = A1111Pass(MergeConfig(), lambda error: None)
    work._detach, work.sessions = (lambda: None), [MergeSession(MergeConfig())]
    for owners, means in (((0, 0, 0, 1), [7 / 3, 8.0]), ((0, 0, 2, 2), [1.5, 30.0, 6.0]), ((0, 0, 0, 0), [3.75])):
        work._conds, work._owners, work._branches = 4, owners, ()
        unconds = [10.0 * (i + 2) for i in range(max(owners) + 1)]
        rows = torch.tensor([1.0, 2.0, 4.0, 8.0, *unconds]).view(-1, 1, 1, 1).expand(-1, 4, 2, 2)
        work.cfg_denoised(SimpleNamespace(x=rows))
        cond, uncond = seen[-1]
        assert cond[:, 0, 0, 0].tolist() == pytest.approx(means)  # an image without rows of its own has its uncond's
        assert torch.equal(uncond, rows[4:])


def test_a1111_tiles_pass_through_unharmed(a1111: A1111) -> None:
    a1111.tiles = 2
    plain, _ = a1111.generate([])
    assert same(plain, a1111.generate([FAST])[0])
    assert last(a1111)["passes"][0]["statistics"]["tokens_before"] == 0
    assert "nothing was merged; the model was called with a part of the picture" in last(a1111)["summary"]
    assert not a1111.errors


def test_a1111_projections_that_another_extension_replaces_get_all_tokens(a1111: A1111) -> None:
    """ControlNet-LLLite adds what it made of its own picture, token by token, to what `to_q` is given."""
    projection: Any = unet_of(a1111).first.attn1.to_q  # type: ignore[union-attr]
    before, _ = a1111.generate([FAST])
    original = projection.forward
    projection.forward = lambda x: original(x + torch.linspace(0, 1, 32 * 32).view(1, -1, 1))
    plain, _ = a1111.generate([])
    merged, _ = a1111.generate([FAST])
    assert same(plain, merged)
    assert "ControlNet-LLLite" in last(a1111)["summary"]
    projection.forward = original  # it stays on the instance
    assert same(before, a1111.generate([FAST])[0])
    assert not a1111.errors


def test_a1111_cross_attention_that_another_extension_replaces_gets_all_tokens(a1111: A1111) -> None:
    """Regional Prompter cuts its masks to the number of tokens that it expects."""
    layers: list[Any] = [m.attn2 for m in unet_of(a1111).modules() if hasattr(m, "attn2")]
    lengths: set[int] = set()
    plain, _ = a1111.generate([])
    for layer in layers:

        def forward(x: Tensor, context: Tensor, original: Any = layer.forward) -> Tensor:
            lengths.add(x.shape[1])
            return original(x, context=context)

        layer.forward = forward
    attention, _ = a1111.generate([FAST])
    assert not same(plain, attention)
    for fields in ({"modules": ["block"]}, {"early_ratio": 0.5, "early_modules": ["attn2"]}):
        assert same(plain, a1111.generate([{**FAST, **fields}])[0])
        assert "Regional Prompter" in last(a1111)["summary"]
    assert lengths == {32 * 32, 16 * 16}
    for layer in layers:
        del layer.forward
    blocks, _ = a1111.generate([{**FAST, "modules": ["block"]}])
    assert not any(same(blocks, other) for other in (plain, attention))
    assert not a1111.errors


def test_a1111_blocks_that_another_extension_drives_get_all_tokens(a1111: A1111) -> None:
    """ControlNet's reference: the model's forward, replaced, runs every block on another picture's latent first."""
    unet: Any = unet_of(a1111)
    before, _ = a1111.generate([FAST])
    original = unet.forward

    def forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        other: Tensor = original(x.flip(-1), *args, **kwargs)
        return 0.9 * original(x, *args, **kwargs) + 0.1 * other

    unet.forward = MethodType(forward, unet)
    for block in (unet.first, unet.last):
        block._forward = MethodType(lambda self, x, context=None: x, block)
    plain, _ = a1111.generate([])
    merged, _ = a1111.generate([FAST])
    assert same(plain, merged)
    assert "ControlNet's reference" in last(a1111)["summary"]
    unet.forward = original  # the blocks stay as they are
    assert same(before, a1111.generate([FAST])[0])
    assert not a1111.errors


def test_a1111_a_reference_pass_inside_the_model_is_left_alone(a1111: A1111) -> None:
    """ControlNet's reference mode: each block's attention also runs over a longer context, kept from another pass."""
    unet = unet_of(a1111)

    class Block(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.attn1, self.rest = block.attn1, block

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            bank = self.rest.norm1(x)
            x = self.attn1(bank, context=torch.cat([bank, bank.flip(0)], 1)) + x
            x = self.rest.attn2(self.rest.norm2(x), context=context) + x
            return self.rest.ff(self.rest.norm3(x)) + x

    unet.first = Block(unet.first)
    plain, _ = a1111.generate([])
    a1111.generate([FAST])
    layers = last(a1111)["passes"][0]["statistics"]["layers"]
    assert not any(name.startswith("first") for name in layers)
    assert any(name.startswith("last") for name in layers)
    assert same(plain, a1111.generate([])[0])
    assert not a1111.errors


def test_forge_split_calls_and_guidance_off(forge: Forge) -> None:
    """Cond first, the calls share the pairs that one call would make. Uncond first, they share the uncond's, which are
    others; only where each branch has its own must the picture be the same."""

    def merged(**fields: Any) -> tuple[Tensor, dict[str, Any]]:
        lengths_differ = fields.pop("lengths_differ", False)
        picture, _ = forge.generate([{**FAST, **fields}], lengths_differ=lengths_differ)
        statistics: dict[str, Any] = last(forge)["passes"][0]["statistics"]
        assert statistics["merged_fraction"] == pytest.approx(0.5)
        assert statistics["importance_merged"] is not None
        return picture, statistics

    whole, of_whole = merged()
    parts, of_parts = merged(lengths_differ=True)
    torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-3)
    assert len(of_parts["steps"]) == 2 * len(of_whole["steps"])
    apart, _ = merged(share_branches=False)
    assert not torch.allclose(whole, apart, rtol=1e-3, atol=1e-3)
    forge.split = True
    parts, of_parts = merged()
    made = of_whole["pairings_made"]
    assert (of_parts["pairings_made"], of_parts["pairings_reused"]) == (made, made)
    torch.testing.assert_close(apart, merged(share_branches=False)[0], rtol=1e-3, atol=1e-3)
    forge.generate([FAST], cfg_scale=1.0)
    statistics = last(forge)["passes"][0]["statistics"]
    assert statistics["merged_fraction"] == pytest.approx(0.5)
    assert statistics["importance_merged"] is None
    assert not forge.errors


def test_forge_a_refiner_is_merged_too_and_left_as_it_was(forge: Forge) -> None:
    guided, sigmas = forge._guided, []
    objects, first = forge.shared.sd_model.forge_objects, forge.clean
    second = UnetPatcher(
        SimpleNamespace(diffusion_model=ForgeUNet().eval().requires_grad_(False), predictor=first.model.predictor)
    )
    refiner = SimpleNamespace(forge_objects=SimpleNamespace(unet=second))

    def swapping(p: Any, denoiser: Any, options: Any, x: Tensor, sigma: float) -> Tensor:
        """The host swaps before it tells of a step, and reads the model's options after that."""
        sigmas.append(sigma)
        if len(sigmas) == 3:
            forge.clean = second
            forge.modules.shared.sd_model = forge.shared.sd_model = refiner
        tell, found = forge.tell, dict(options)

        def telling(name: str, *args: Any) -> None:
            tell(name, *args)
            if name == "cfg_denoiser":
                found.clear()
                found.update(forge.shared.sd_model.forge_objects.unet.model_options)

        forge.tell = telling  # type: ignore[method-assign]
        try:
            return guided(p, denoiser, found, x, sigma)
        finally:
            forge.tell = tell  # type: ignore[method-assign]

    forge._guided = swapping  # type: ignore[method-assign]
    forge.generate([FAST], steps=6)
    steps = last(forge)["passes"][0]["statistics"]["steps"]
    assert [step["sigma"] for step in steps] == pytest.approx(sigmas)
    assert all(step["merged_fraction"] == pytest.approx(0.5) for step in steps)
    assert steps[2]["pairings_made"] > 0
    assert objects.unet is first
    assert refiner.forge_objects.unet is second
    assert not second.model_options["transformer_options"]
    assert hooks_on(first.model.diffusion_model) == hooks_on(second.model.diffusion_model) == 0
    assert not last(forge)["error"]
    assert not forge.errors


def test_forge_similarity_of_the_block_is_of_the_block(forge: Forge) -> None:
    pictures = [forge.generate([{**FAST, "metric": metric}])[0] for metric in ("attention", "block", "position")]
    assert not any(same(a, b) for a, b in zip(pictures, pictures[1:] + pictures[:1], strict=True))
    assert hooks_on(unet_of(forge)) == 0
    assert not last(forge)["error"]
    assert not forge.errors


def test_forge_merges_attn1_and_blocks_and_says_so_if_more_is_asked_for(forge: Forge) -> None:
    plain, _ = forge.generate([])
    merged, _ = forge.generate([FAST])
    assert same(merged, forge.generate([{**FAST, "modules": ["attn1", "ff"]}])[0])
    assert any("only attn1 and block" in note for note in last(forge)["passes"][0]["statistics"]["notes"])
    early = {**FAST, "early_ratio": 0.5, "early_sigma": 1.0}
    one = forge.generate([early])[0]
    assert same(one, forge.generate([{**early, "early_modules": ["attn1", "attn2"]}])[0])
    assert any("only attn1 and block" in note for note in last(forge)["passes"][0]["statistics"]["notes"])
    assert same(plain, forge.generate([{**FAST, "modules": ["ff"]}])[0])
    assert "modules is ff" in last(forge)["stood_aside"]
    assert not forge.errors


@pytest.mark.parametrize("ratio", [0.75, 0.6])
def test_forge_blocks_on_merged_duplicates_are_exact(forge: Forge, ratio: float) -> None:
    """Though they add to the tokens that they are given in place."""
    h = torch.randn(2, 16, 8, 8).repeat_interleave(2, 2).repeat_interleave(2, 3)  # each 2x2 cell is one token
    context, transformer = torch.randn(2, 3, 8), unet_of(forge).input_blocks[1]
    told = {"cond_or_uncond": [1, 0], "sigmas": torch.tensor([1.0]), "original_shape": [2, 4, 16, 16]}
    plain = transformer(h, context, dict(told))
    config = MergeConfig(modules=("block",), ratio=ratio, threshold=None, min_tokens=0)
    errors: list[Exception] = []
    work = ForgePass(config, torch.zeros(1, 4, 16, 16), errors.append)
    options = work.patched(forge.clean).model_options["transformer_options"]
    torch.testing.assert_close(transformer(h, context, {**options, **told}), plain, rtol=1e-4, atol=1e-4)
    assert work.session.stats.to_dict()["merged_fraction"] == pytest.approx(ratio, abs=0.01)
    work.close()
    assert torch.equal(transformer(h, context, dict(told)), plain)
    assert not errors


def test_forge_merges_whole_blocks_and_early_ones_alone(forge: Forge) -> None:
    before = [dict(m._forward_pre_hooks) for m in unet_of(forge).modules()]
    plain, _ = forge.generate([])
    merged, _ = forge.generate([FAST])
    blocks, _ = forge.generate([{**FAST, "modules": ["block"]}])
    statistics = last(forge)["passes"][0]["statistics"]
    assert statistics["merged_fraction"] == pytest.approx(0.5)
    assert set(statistics["layers"]) == {"input.1.0", "output.0.0"}
    assert not any(same(blocks, other) for other in (plain, merged))
    early, _ = forge.generate([{**FAST, "early_ratio": 0.75, "early_sigma": 1.0, "early_modules": ["block"]}])
    shares = {
        (step["sigma"] > 1, name, round(1 - layer["tokens_after"] / layer["tokens_before"], 3))
        for step in last(forge)["passes"][0]["statistics"]["steps"]
        for name, layer in step["layers"].items()
    }
    assert shares == {
        *((True, name, 0.75) for name in ("input.1.0", "output.0.0")),
        *((False, f"{name}.attn1", 0.5) for name in ("input.1.0", "output.0.0")),
    }
    assert not any(same(early, other) for other in (plain, merged, blocks))
    assert same(plain, forge.generate([])[0])
    assert [dict(m._forward_pre_hooks) for m in unet_of(forge).modules()] == before
    assert not forge.errors


@pytest.mark.parametrize("patch", ["attn1", "attn2"])
def test_forge_blocks_whose_tokens_other_extensions_see_are_not_merged_whole(forge: Forge, patch: str) -> None:
    lengths: set[int] = set()

    def see(n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        lengths.add(n.shape[1])
        return n, context, value

    def put_on(unet: Any) -> None:
        getattr(unet, f"set_model_{patch}_patch")(see)

    forge.later = put_on
    attention, _ = forge.generate([FAST])
    lengths.clear()
    blocks, _ = forge.generate([{**FAST, "modules": ["block"]}])
    assert any("other extensions see" in note for note in last(forge)["passes"][0]["statistics"]["notes"])
    assert same(blocks, attention)
    assert patch == "attn1" or min(lengths) == 16 * 16  # all of the coarser level's
    assert not forge.errors


@pytest.mark.parametrize("host", ["a1111", "forge"])
def test_the_feed_forward_is_halved_in_a_merged_pass_and_in_no_other(host: str, request: pytest.FixtureRequest) -> None:
    webui = request.getfixturevalue(host)
    seen = watched(unet_of(webui))
    plain, _ = webui.generate([])
    name = next(iter(seen))  # of the finest level
    whole = set(seen.pop(name))
    webui.generate([FAST])
    assert set(seen.pop(name)) == {n // 2 for n in whole}
    assert same(plain, webui.generate([])[0])
    assert set(seen[name]) == whole
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet_of(webui).modules())
    assert not webui.errors


def test_a1111_merges_whole_blocks(a1111: A1111) -> None:
    plain, _ = a1111.generate([])
    attention, _ = a1111.generate([FAST])
    blocks, _ = a1111.generate([{**FAST, "modules": ["block"]}])
    assert last(a1111)["passes"][0]["statistics"]["merged_fraction"] == pytest.approx(0.5)
    assert not same(blocks, plain)
    assert not same(blocks, attention)
    assert same(plain, a1111.generate([])[0])
    assert not a1111.errors


def test_forge_leaves_attention_that_others_replace_to_them(forge: Forge) -> None:
    def replace(unet: UnetPatcher) -> None:
        unet.set_model_attn1_replace(lambda q, k, v, extra: attention_function(q, k, v, extra["n_heads"]), "input", 1)

    forge.later = replace
    forge.generate([FAST])
    statistics = last(forge)["passes"][0]["statistics"]
    assert any("another extension replaces the attention of input block 1" in note for note in statistics["notes"])
    assert [len(step["layers"]) for step in statistics["steps"]][-1] == 1
    assert not forge.errors


def test_forge_where_others_replace_all_attention_merging_stands_aside(forge: Forge) -> None:
    forge.clean = forge.clean.clone()
    for place in (("input", 1), ("middle", 0), ("output", 0)):
        forge.clean.set_model_attn1_replace(
            lambda q, k, v, extra: attention_function(q, k, v, extra["n_heads"]), *place
        )
    plain, _ = forge.generate([])
    for fields in ({}, {"modules": ["block"]}):
        picture, told = forge.generate([{**FAST, **fields}])
        assert same(picture, plain)
        reason = "stood aside: another extension replaces the attention of all blocks"
        assert told["ToMe Sampler"].startswith(reason)
    assert hooks_on(unet_of(forge)) == 0
    assert not forge.errors


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_forge_attention_that_others_give_their_own_q_k_or_v_is_left_alone(forge: Forge, changed: int) -> None:
    def patch(*args: Any) -> tuple[Tensor, ...]:
        *tensors, extra = args
        if extra["block"] == ("input", 1):
            tensors[changed] = tensors[changed] + torch.linspace(0, 1, 32 * 32).view(1, -1, 1)
        return tuple(tensors)

    forge.clean.set_model_attn1_patch(patch)
    plain, _ = forge.generate([])
    merged, _ = forge.generate([FAST])
    statistics = last(forge)["passes"][0]["statistics"]
    assert statistics["merged_fraction"] == pytest.approx(0.5)
    assert not any(name.startswith("input") for name in statistics["layers"])
    assert any(name.startswith("output") for name in statistics["layers"])
    assert any("q, k or v" in note for note in statistics["notes"])
    assert not same(plain, merged)
    assert not forge.errors


def test_what_we_cannot_merge_we_leave_alone_and_say_so(host: Host) -> None:
    plain, _ = host.generate([])
    host.shared.opts.data["token_merging_ratio"] = 0.5
    picture, params = host.generate([FAST])
    assert same(plain, picture)
    assert params == {"ToMe Sampler": "stood aside: " + last(host)["stood_aside"]}
    assert "host's own token merging" in params["ToMe Sampler"]
    assert "host's own token merging" in host.app.run.record.summary
    host.shared.opts.data.clear()
    if isinstance(host, Forge):
        host.clean.model.diffusion_model, kept = nn.Conv2d(4, 4, 1), host.clean.model.diffusion_model
        p = _p(host)
        host.hook("process", p, *host._arguments([FAST]))
        host.app.run.begin_pass(p, torch.zeros(1, 4, 32, 32), None)
        assert "nothing to merge" in last(host)["stood_aside"]
        host.clean.model.diffusion_model = kept
    else:
        host.shared.opts.data["hypertile_enable_unet"] = True
        assert same(plain, host.generate([FAST])[0])
        assert "Hypertile" in last(host)["stood_aside"]
        host.shared.opts.data.clear()
        host.modules.sd_unet.current_unet = object()
        assert same(plain, host.generate([FAST])[0])
        assert "alternative U-Net" in last(host)["stood_aside"]
        host.modules.sd_unet.current_unet = None
    assert not same(plain, host.generate([FAST])[0])
    assert not host.errors


def test_a_hypernetwork_in_attention_that_cannot_be_reached_is_left_to_it(
    a1111: A1111, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, loaded = a1111, []
    monkeypatch.setattr(host.modules.shared, "loaded_hypernetworks", loaded, raising=False)
    hijack: Any = ModuleType("modules.sd_hijack")
    hijack.model_hijack = SimpleNamespace(optimization_method="xformers")
    monkeypatch.setitem(sys.modules, hijack.__name__, hijack)
    plain, _ = host.generate([])
    assert not same(plain, host.generate([FAST])[0])
    loaded.append(object())
    assert same(plain, host.generate([FAST])[0])
    assert "hypernetwork" in last(host)["stood_aside"]
    assert "xformers" in last(host)["stood_aside"]
    hijack.model_hijack.optimization_method = "sdp"
    assert not same(plain, host.generate([FAST])[0])
    assert not host.errors


@pytest.mark.parametrize(
    "inner", [{"enabled": False}, {**FAST, "ratio": 0.25}, None], ids=["off", "other", "ours not run"]
)
def test_what_another_script_generates_between_pictures_changes_none_of_them(host: Host, inner: Any) -> None:
    expected, told = host.generate([FAST], n_iter=2)
    save, others = host.save, []

    def detail(p: Any, name: str) -> None:  # a detailer's postprocess_image
        if not others:
            others.append(name)
            if inner is None:
                host.run_pass(_p(host), torch.randn(1, 4, 24, 24))
            else:
                host.generate([inner], size=(24, 24))
        save(p, name)

    host.save = detail
    found, params = host.generate([FAST], n_iter=2)
    host.save = save
    assert others
    assert same(found, expected)
    assert params == told
    assert [one["statistics"]["merged_fraction"] for one in last(host)["passes"]] == [0.5, 0.5]
    assert not host.errors


def _p(host: Host) -> Any:
    return Processing(host, [FAST])


FAULT = "a fault put in by the test, in /a/folder"


def failing(at: int, whole: Any, kind: type[Exception] = RuntimeError) -> Any:
    """`whole`, which raises at its call `at` and is counted by `calls`."""

    def broken(*args: Any, **kwargs: Any) -> Any:
        broken.calls += 1  # type: ignore[attr-defined]
        if broken.calls > at:  # type: ignore[attr-defined]
            raise kind(FAULT)
        return whole(*args, **kwargs)

    broken.calls = 0  # type: ignore[attr-defined]
    return broken


@pytest.mark.parametrize("modules", [["attn1"], ["block"]])
@pytest.mark.parametrize("place", ["match", "merge"])
def test_an_error_of_ours_leaves_the_plain_picture_and_is_said_once(
    host: Host, modules: list[str], place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain, _ = host.generate([])
    host.generate([FAST])  # the device is known to be able
    whole = MergeSession if place == "match" else Pairing
    with monkeypatch.context() as patch:
        patch.setattr(whole, "merge", failing(0, whole.merge))
        picture, told = host.generate([{**FAST, "modules": modules}])
    assert same(plain, picture)
    assert told == {"ToMe Sampler": "stood aside: merging failed (RuntimeError)"}  # whose text is not passed on
    found = last(host)
    assert found["summary"] == f"Merging failed and the picture was made without it: RuntimeError: {FAULT}"
    assert found["passes"][0]["statistics"]["merged_fraction"] == 0
    assert found["stood_aside"] == "merging failed (RuntimeError)"
    assert sum("sampling goes on without it" in r.getMessage() for r in caplog.records) == 1
    assert hooks_on(unet_of(host)) == 0
    assert not host.errors


@pytest.mark.parametrize("modules", [["attn1"], ["block"]])
def test_after_an_error_of_ours_on_the_way_the_rest_is_unmerged_and_said_to_be(
    host: Host, modules: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {**FAST, "modules": modules}
    plain, (merged, expected) = host.generate([])[0], host.generate([asked])
    with monkeypatch.context() as patch:
        patch.setattr(Pairing, "merge", failing(3, Pairing.merge))
        picture, told = host.generate([asked])
    assert not any(same(picture, other) for other in (plain, merged))
    said = "merging failed (RuntimeError) on the way, and the rest was made without it"
    assert told == {**expected, "ToMe first pass": said}
    found = last(host)
    shares = [step["merged_fraction"] for step in found["passes"][0]["statistics"]["steps"]]
    assert shares[0] == pytest.approx(0.5)
    assert not any(shares[2:])
    assert found["passes"][0]["failed"] == said
    assert found["summary"].startswith("Last run (Balanced): ")
    assert found["summary"].endswith(f" First pass: {said}. Error: RuntimeError: {FAULT}")
    assert "first pass" not in host.generate([asked])[1]
    assert not host.errors


def test_an_error_before_the_first_step_is_said_and_the_hires_pass_is_merged(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, name = (ForgePass, "patched") if isinstance(host, Forge) else (A1111Pass, "cfg_denoiser")
    whole, failed = getattr(kind, name), []

    def fails_once(*args: Any) -> Any:
        if not failed:
            failed.append(True)
            raise RuntimeError(FAULT)
        return whole(*args)

    plain, _ = host.generate([])
    monkeypatch.setattr(kind, name, fails_once)
    picture, told = host.generate([FAST])
    assert same(picture, plain)  # in all of its steps, as its parameters say
    assert told == {"ToMe Sampler": "stood aside: merging failed (RuntimeError)"}
    failed.clear()
    _, told = host.generate([FAST], enable_hr=True)
    assert told["ToMe first pass"] == "stood aside: merging failed (RuntimeError)"
    assert told["ToMe Sampler"] == "Balanced"
    assert [one["statistics"]["merged_fraction"] for one in last(host)["passes"]] == pytest.approx([0, 0.5])
    assert last(host)["summary"].endswith(
        f"First pass stood aside: merging failed (RuntimeError). Error: RuntimeError: {FAULT}"
    )
    assert hooks_on(unet_of(host)) == 0
    assert not host.errors


def test_an_error_where_a_model_call_begins_is_none_of_the_hosts(a1111: A1111) -> None:
    plain, _ = a1111.generate([])
    before = a1111.callbacks["cfg_denoiser"][:]
    a1111.callbacks["cfg_denoiser"].insert(0, lambda params: params.sigma.zero_())  # no noise level that there is
    picture, told = a1111.generate([FAST])
    a1111.callbacks["cfg_denoiser"][:] = before
    assert same(picture, plain)
    assert told == {"ToMe Sampler": "stood aside: merging failed (ValueError)"}
    assert hooks_on(unet_of(a1111)) == 0
    assert not a1111.errors


def test_statistics_that_cannot_be_read_do_not_make_a_merged_picture_an_unmerged_one(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged, expected = host.generate([FAST])
    with monkeypatch.context() as patch:
        patch.setattr(host.app.run.record.passes[0].session.stats.__class__, "to_dict", failing(0, None))
        picture, told = host.generate([FAST])
        assert host.app.run.record.summary == f"Error: RuntimeError: {FAULT}"
    assert same(picture, merged)
    assert told == expected
    assert not host.errors


@pytest.mark.parametrize(
    ("kind", "for_good"),
    [(torch.cuda.OutOfMemoryError, False), (RuntimeError, False), (NotImplementedError, True), (TypeError, True)],
)
def test_only_what_a_device_cannot_do_is_remembered_of_it(
    host: Host, kind: type[Exception], for_good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = sys.modules["tome_sampler_extension.run"]
    monkeypatch.setattr(run, "global_match", failing(0, global_match, kind))
    _, told = host.generate([FAST])
    assert told["ToMe Sampler"].startswith(
        "stood aside: this device (cpu) could" if not for_good else "stood aside: this device (cpu) cannot"
    )
    monkeypatch.setattr(run, "global_match", failing(1, global_match))
    for _ in range(2):  # success is remembered too
        _, told = host.generate([FAST])
        assert told["ToMe Sampler"].startswith("stood aside") is for_good
    assert not host.errors


def test_reloading_the_page_amid_a_call_ends_merging_and_not_the_picture(host: Host) -> None:
    plain, merged = host.generate([])[0], host.generate([FAST])[0]
    layer = next(m.to_q for m in unet_of(host).modules() if hasattr(m, "to_q"))
    reloads = []

    def reload(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """In a thread of its own, as the hosts do."""
        if not reloads and args[0].shape[1] == 512:
            reloads.append(threading.Thread(target=lambda: [call() for call in host.callbacks["script_unloaded"]]))
            reloads[0].start()
            reloads[0].join()

    with layer.register_forward_pre_hook(reload):
        picture, told = host.generate([FAST])
    assert reloads
    said = "merging ended (the UI was reloaded) on the way, and the rest was made without it"
    assert told["ToMe first pass"] == said
    assert f"First pass: {said}." in last(host)["summary"]
    assert bool(torch.isfinite(picture).all())
    assert not any(same(picture, other) for other in (plain, merged))
    assert torch._C._len_torch_function_stack() == 0
    assert hooks_on(unet_of(host)) == 0
    assert not host.app.run.at_work
    assert same(merged, host.generate([FAST])[0])
    assert not host.errors


@pytest.mark.parametrize("kind", [RuntimeError, Interrupted])
def test_nothing_is_left_after_an_exception_or_an_interrupt(host: Host, kind: type[BaseException]) -> None:
    plain, _ = host.generate([])

    def fault(call: int) -> None:
        if call >= 2:
            raise kind("a fault put in by the test")

    host.model_calls.clear()
    host.fault = fault
    if kind is RuntimeError:
        with pytest.raises(RuntimeError):
            host.generate([FAST])
    else:
        host.generate([FAST])
    host.fault = None
    assert hooks_on(unet_of(host)) == 0
    assert not host.app.run.at_work
    assert same(plain, host.generate([])[0])


@pytest.mark.parametrize("kind", [RuntimeError, Interrupted])
def test_nothing_is_left_after_one_inside_a_merged_block(host: Host, kind: type[BaseException]) -> None:
    asked = {**FAST, "modules": ["block"]}
    plain, merged = host.generate([])[0], host.generate([asked])[0]
    layer: Any = next(m.attn2 for m in unet_of(host).modules() if hasattr(m, "attn2"))
    whole = layer.to_q.forward
    lengths: list[int] = []

    def fail(x: Tensor) -> Tensor:
        lengths.append(x.shape[1])
        if len(lengths) == 2:
            raise kind("a fault put in by the test")
        return whole(x)

    layer.to_q.forward = fail
    if kind is RuntimeError:
        with pytest.raises(RuntimeError, match="a fault"):
            host.generate([asked])
    else:
        host.generate([asked])
    del layer.to_q.forward
    assert lengths == [512, 512]  # of 1024
    assert hooks_on(unet_of(host)) == 0
    assert not host.app.run.at_work
    assert same(plain, host.generate([])[0])
    assert same(merged, host.generate([asked])[0])


def test_grid_cells(host: Host) -> None:
    assert len({o.label for o in host.grid.axis_options}) == len(host.grid.axis_options) > 20
    plain, _ = host.generate([])
    pictures = host.cells([FAST], "[ToMe Sampler] Merge ratio", [0.0, 0.5, 0.25])
    assert same(plain, pictures[0])
    assert not same(pictures[1], pictures[2])
    assert same(pictures[1], host.generate([FAST])[0])
    off, half, most = host.cells([FAST], "[ToMe Sampler] Early ratio", ["off", "0.5", "0.9"])
    assert same(off, half)
    assert same(off, pictures[1])
    assert not same(off, most)
    late, early = host.cells([{**FAST, "early_ratio": 0.75}], "[ToMe Sampler] Early until sigma", [15.0, 3.0])
    assert same(late, off)
    assert not same(early, off)
    with pytest.raises(ValueError, match=r"early_ratio is 2\.0; it must be a number from 0 to 0\.99"):
        host.cells([FAST], "[ToMe Sampler] Early ratio", ["2"])
    off, on = host.cells([False], "[ToMe Sampler] Preset", ["Off", "ToMe-SD"])
    assert same(plain, off)
    assert not same(plain, on)
    with pytest.raises(ValueError, match=r"ratio is 3\.0; it must be a number from 0 to 0\.9375"):
        host.cells([FAST], "[ToMe Sampler] Merge ratio", [0.5, 3.0])

    def fault(call: int) -> None:
        raise RuntimeError("a fault put in by the test")

    host.fault = fault
    assert host.cells([FAST], "[ToMe Sampler] Merge ratio", [0.5]) == []
    host.fault = None
    host.errors.clear()
    assert same(plain, host.generate([])[0])
    assert hooks_on(unet_of(host)) == 0
    assert not host.errors


def test_a_grids_custom_and_its_fields_start_from_what_the_page_holds(host: Host) -> None:
    config = MergeConfig(ratio=0.3, threshold=None, early_ratio=None, min_tokens=0)
    page = ["Custom", *(field.shown(config) for field in host.app.ui.FIELDS)]
    held, _ = host.generate([True, *page])
    for enabled in (True, False):
        custom, fast = host.cells([enabled, *page], "[ToMe Sampler] Preset", ["Custom", "Fast"])
        assert same(custom, held)
        assert not same(fast, held)
        assert same(host.cells([enabled, *page], "[ToMe Sampler] Merge ratio", [0.3])[0], held)
    assert not host.errors


def test_a_grid_has_the_users_own_presets(host: Host) -> None:
    option = next(o for o in host.grid.axis_options if o.label == "[ToMe Sampler] Preset")
    assert "mine" not in option.choices()
    with pytest.raises(ValueError, match="preset is 'mine'; it must be one of Off"):
        option.confirm(None, ["Fast", "mine"])
    host.app.presets.save(
        "mine", MergeConfig.from_dict({k: v for k, v in FAST.items() if k not in ("enabled", "preset")})
    )
    assert option.choices()[-2:] == ["Custom", "mine"]
    assert same(host.cells([False], "[ToMe Sampler] Preset", ["mine"])[0], host.generate([FAST])[0])
    assert last(host)["preset"] == "Balanced"
    assert not host.errors


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([{"enabled": True, "ratoi": 0.5}], "there is no argument 'ratoi'"),
        ([{"enabled": True, "ratio": 0.9}], "ratio is 0.9; it must be a number from 0 to 0.75"),
        ([{"enabled": "yes"}], "enabled is 'yes'; it must be true or false"),
        ([{"preset": "best"}], "preset is 'best'; it must be one of Off"),
        ([True, "Custom", "much"], "ratio is 'much'; it must be a number"),
        ([{"hires": {"enabled": True}}], "hires has no argument 'enabled'"),
    ],
)
def test_a_bad_request_gets_a_readable_error_and_no_picture(host: Host, args: list[Any], message: str) -> None:
    pytest.importorskip("fastapi")
    from fastapi.exceptions import HTTPException

    with pytest.raises(HTTPException) as caught:
        host.generate(args)
    assert caught.value.status_code == 422
    assert message in caught.value.detail
    with pytest.raises(ValueError, match="ToMe Sampler: "):
        host.generate(args, is_api=False)
    assert not host.errors


def test_settings_reach_the_run(host: Host) -> None:
    plain, _ = host.generate([])
    assert host.shared.opts.data["tome_sampler_min_tokens"] == 0
    host.shared.opts.data["tome_sampler_min_tokens"] = 16384
    assert same(plain, host.generate([FAST])[0])
    host.shared.opts.data["tome_sampler_min_tokens"] = 0
    host.generate([FAST])
    assert last(host)["passes"][0]["maps"] > 0
    host.shared.opts.data["tome_sampler_keep_maps"] = False
    host.generate([FAST])
    assert last(host)["passes"][0]["maps"] == 0
    host.shared.opts.data["tome_sampler_preset"] = "Fast"
    host.generate([{"enabled": True}])
    assert last(host)["preset"] == "Fast"
    host.load()
    assert host.components[1].value == "Fast"
    host.generate([True])
    assert last(host)["preset"] == "Fast"
    host.generate([True, "Quality"])
    assert last(host)["passes"][0]["config"]["early_ratio"] == 0.5


@pytest.mark.parametrize("name", ["Fast", "ToMe-SD"])
def test_a_callers_preset_holds_where_the_setting_is_newer_than_the_page(host: Host, name: str) -> None:
    host.generate([True, name])
    before = last(host)["passes"][0]["config"]
    host.shared.opts.data["tome_sampler_preset"] = "Quality"  # without Reload UI, or by override_settings
    host.generate([True, name])
    assert last(host)["preset"] == name
    assert last(host)["passes"][0]["config"] == before
    host.generate([True, None])
    assert last(host)["preset"] == "Quality"


def test_the_setting_that_leaves_short_layers_alone_is_in_the_infotext(host: Host) -> None:
    asked = {"preset": "tomesd", "levels": 2, "min_tokens": 100, "hires": {"preset": "fast", "min_tokens": "auto"}}
    plain, _ = host.generate([], enable_hr=True)
    without, _ = host.generate([asked], enable_hr=True)
    host.shared.opts.data["tome_sampler_min_tokens"] = 512  # between the two levels of the first pass
    with_it, told = host.generate([asked], enable_hr=True)
    assert not any(same(with_it, other) for other in (plain, without))
    assert told["ToMe min tokens"] == told["ToMe hires min tokens"] == "512"
    host.shared.opts.data["tome_sampler_min_tokens"] = 0
    again, retold = host.generate(host.app.infotext.control_values(told), enable_hr=True)
    assert same(again, with_it)
    assert retold["ToMe min tokens"] == "512"
    for found, least in ((256, 1024), (2000, 2000), ("auto", 1024)):
        host.shared.opts.data["tome_sampler_min_tokens"] = 1024
        host.generate([{**FAST, "min_tokens": found}])
        assert last(host)["passes"][0]["config"]["min_tokens"] == least
    for found, least in ((float("inf"), 65536), (10**9, 65536), (-1, 0), ("a lot", 0), (None, 0), (True, 0)):
        host.shared.opts.data["tome_sampler_min_tokens"] = found
        _, told = host.generate([FAST])
        assert last(host)["passes"][0]["config"]["min_tokens"] == least
        assert told["ToMe min tokens"] == str(least)
    assert not host.errors


def test_reload_leaves_nothing_behind(host: Host) -> None:
    before = {name: len(found) for name, found in host.callbacks.items()}
    merged, _ = host.generate([FAST])
    host.load()
    assert {name: len(found) for name, found in host.callbacks.items()} == before
    assert same(merged, host.generate([FAST])[0])
    labels = [o.label for o in host.grid.axis_options]
    assert len(labels) == len(set(labels))


@pytest.mark.parametrize("ours_first", [True, False])
def test_another_extensions_package_of_the_same_name_is_left_alone(tmp_path: Path, ours_first: bool) -> None:
    other = tmp_path / "other"
    (other / "extension").mkdir(parents=True)
    (other / "extension" / "__init__.py").write_text("WHOSE = 'theirs'\n")

    def load_other() -> Any:
        sys.path.insert(0, str(other))
        try:
            import extension
        finally:
            sys.path.remove(str(other))
        return extension

    with clean_modules():
        sys.modules.pop("extension", None)
        host = A1111()
        host.install(tmp_path)
        theirs = None if ours_first else load_other()
        host.load()
        theirs = theirs or load_other()
        assert theirs.WHOSE == "theirs"
        assert sys.modules["extension"] is theirs
        assert host.app.__name__ == "tome_sampler_extension.app"
        assert not same(host.generate([])[0], host.generate([FAST])[0])
        sys.modules.pop("extension", None)


def test_a_thousand_runs_leave_nothing(host: Host) -> None:
    """Random settings, interrupts, exceptions."""
    rng = random.Random(0)
    plain, _ = host.generate([], steps=2, size=(8, 8))
    tensors = []
    for n in range(1000):
        args: dict[str, Any] = {
            "preset": rng.choice(["quality", "balanced", "fast", "tomesd", "ca_tome", "importance"]),
            "min_tokens": 0,
            "start": rng.choice([0, 0.5]),
            "levels": rng.choice([1, 2]),
        }
        at = rng.randrange(2)
        kind = rng.choice([None, None, RuntimeError, Interrupted])

        def fault(call: int, at: int = at, kind: Any = kind) -> None:
            if kind is not None and call >= at:
                raise kind("a fault put in by the test")

        host.model_calls.clear()
        host.fault = fault
        try:
            host.generate([args], steps=2, size=(8, 8), batch_size=rng.choice([1, 2]), conds=rng.choice([1, 2]))
        except RuntimeError:
            assert kind is RuntimeError
        host.fault = None
        assert not host.app.run.at_work
        if n in (200, 999):
            gc.collect()
            tensors.append(sum(isinstance(o, Tensor) for o in gc.get_objects()))
    assert hooks_on(unet_of(host)) == 0
    assert same(plain, host.generate([], steps=2, size=(8, 8))[0])
    assert tensors[1] <= tensors[0] + 60
    assert not host.errors


def test_routes_answer_within_bounds_and_behind_the_hosts_password(host: Host) -> None:
    fastapi = pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    app = fastapi.FastAPI()
    host.generate([FAST])
    for _ in range(2):  # again after a reload of the UI
        host.tell("app_started", None, app)
    client, root = TestClient(app), "/tome-sampler/v1"
    assert client.get(f"{root}/version").json()["title"] == "ToMe Sampler"
    schema = client.get(f"{root}/schema").json()["properties"]
    assert schema["ratio"]["maximum"] == 0.9375
    assert schema["early_ratio"]["type"] == ["number", "null"]
    assert schema["early_ratio"]["default"] == MergeConfig().early_ratio
    assert client.get(f"{root}/presets").json()["Fast"] == MergeConfig.preset("fast").to_dict()
    found = client.get(f"{root}/last").json()
    assert found["passes"][0]["statistics"]["merged_fraction"] == pytest.approx(0.5)
    number = found["passes"][0]["maps"] - 1
    for kind in ("importance", "groups"):
        answer = client.get(f"{root}/last/overlay/{number}/{kind}")
        assert answer.headers["content-type"] == "image/png"
    for wrong in (f"{number + 1}/groups", "0/other", "-1/groups"):
        assert client.get(f"{root}/last/overlay/{wrong}").status_code == 404
    guarded = fastapi.FastAPI()
    host.shared.cmd_opts.api_auth = "user:secret"
    host.tell("app_started", None, guarded)
    client = TestClient(guarded)
    assert client.get(f"{root}/last").status_code == 401
    assert client.get(f"{root}/last", auth=("user", "wrong")).status_code == 401
    assert client.get(f"{root}/last", auth=("user", "secret")).status_code == 200
    silent = fastapi.FastAPI()
    host.shared.cmd_opts.api = False
    host.tell("app_started", None, silent)
    assert TestClient(silent).get(f"{root}/last").status_code == 404
    assert not host.errors


def test_the_maps_are_saved_beside_a_runs_own_pictures_if_asked_for(host: Host, tmp_path: Path) -> None:
    host.folder = tmp_path

    def saved() -> list[str]:
        found = list(tmp_path.glob("*-tome-*.png"))
        for path in found:
            path.unlink()
        return sorted(path.name.replace("-tome-groups", "").replace("-tome-importance", "") for path in found)

    host.generate([FAST])
    assert saved() == []
    host.shared.opts.data["tome_sampler_save_overlays"] = True
    host.generate([FAST], n_iter=2, batch_size=2)
    assert saved() == ["0-0.png"] * 2 + ["1-0.png"] * 2  # and neither the grid nor a batch's others
    host.save(None, "from-extras.png")
    host.cells([FAST], "[ToMe Sampler] Merge ratio", [0.5])
    assert saved() == ["0-0.png"] * 2
    host.generate([])
    host.shared.opts.data["token_merging_ratio_hr"] = 0.3
    assert saved() == []
    host.generate([FAST], enable_hr=True)
    assert saved() == ["0-0.png"] * 2  # the first pass's, beside the hires pass that stood aside
    p = _p(host)
    host.hook("setup", p)
    host.hook("process", p, *host._arguments([FAST]))
    p.close()  # an exception in sampling skips all other hooks
    host.save(p, "later.png")
    assert saved() == []
    assert not host.errors


def test_maps_that_lie_on_the_device_can_be_drawn(host: Host) -> None:
    class OnDevice(Tensor):
        """What a map holds while its pass is under way on a GPU."""

        def numpy(self, *, force: bool = False) -> Any:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

        def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
            return self.as_subclass(Tensor)

    host.generate([FAST])
    record = host.app.run.record
    (one,) = (found := record.passes[0].maps)[-1:]
    before = [host.app.tab.map_html(record, len(found), kind) for kind in ("Importance", "Merged groups")]
    one.target, one.importance = one.target.as_subclass(OnDevice), one.importance.half().as_subclass(OnDevice)
    after = [host.app.tab.map_html(record, len(found), kind) for kind in ("Importance", "Merged groups")]
    assert after[1] == before[1]
    assert "<img" in after[0]


def built(host: Host) -> dict[str, Any]:
    """The tab's components by elem_id, of a host whose page has the steps."""
    from webui import Component

    found: dict[str, Any] = {}
    host.callbacks["after_component"].append(lambda component, **kwargs: found.update({component.elem_id: component}))
    Component(value=4, elem_id="txt2img_steps")
    host.tell("ui_tabs")
    return found


def clicked(component: Any, *values: Any) -> Any:
    (event,) = [event for name, event in component.events if name == "click"]
    return event["fn"](*values)


def test_measure_and_the_hint_know_the_users_own_presets(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.app.presets.save("mine", MergeConfig(ratio=0.3))
    monkeypatch.setattr(host.app.tab, "measure", lambda *args: iter([(0.5, f"{args[0]} {args[1][:2]}")]))
    controls = [c.value for c in host.components]
    names = host.app.ui.element_names()
    for name in ("preset", "hires_preset"):
        controls[names.index(name)] = "mine"
    controls[names.index("hires-checkbox")] = True
    (said,) = clicked(built(host)["tome_sampler_measure"], 1, 4, *controls)
    assert "steps&#x27;: 4} [True, &#x27;mine&#x27;]" in said
    hint = [event["fn"] for name, event in host.components[names.index("ratio")].events if name == "change"]
    assert "Merges 75% of the tokens" in hint[-1](*controls)
    assert not host.errors


def test_an_import_says_what_it_replaced(host: Host) -> None:
    host.app.presets.save("mine", MergeConfig())
    load = built(host)["tome_sampler_own_import"]
    assert clicked(load, '{"mine": {}, "other": {}}')[0] == "<p>Added &#x27;other&#x27;. Replaced &#x27;mine&#x27;.</p>"
    assert clicked(load, '{"third": {}}')[0] == "<p>Added &#x27;third&#x27;.</p>"
    assert clicked(load, "{}")[0] == "<p>There was nothing to import.</p>"
    assert "pool is 10; it must be a number from 0.25 to 4" in clicked(load, '{"mine": {"pool": 10}}')[0]
    assert not host.errors


def test_controls_explain_themselves(host: Host) -> None:
    ui, table = host.app.ui, host.app.ui.FIELDS
    by_id = {c.elem_id: c for c in host.components}
    assert len(by_id) == len(host.components)
    assert [f.name for f in table] == [
        c.elem_id.rsplit("tome_sampler_")[-1] for c in host.components[2 : 2 + len(table)]
    ]
    assert by_id["script_txt2img_tome_sampler_ratio"].kwargs["maximum"] == 0.75
    defaults = [c.value for c in host.components]

    def explained(**values: Any) -> str:
        names = ["enabled", "preset", *(f.name for f in table)]
        moved = [values.get(name, value) for name, value in zip(names, defaults, strict=False)]
        return str(ui.explained(moved, {})).removeprefix("<span class='tome-sampler-hint'>").removesuffix("</span>")

    first = "Merges 75% of the tokens of a layer while sigma is above 3, then 20% to 50%"
    assert explained() == first + "."  # nothing of what the settings that nobody has touched do not do
    assert explained(threshold=0.0, early_sigma=1.5) == (
        "Merges 75% of the tokens of a layer while sigma is above 1.5, then 50%."
    )
    assert explained(early_ratio="off") == "Merges 20% to 50% of the tokens of a layer."
    assert explained(early_ratio="off", early_sigma=1.5) == (
        "Merges 20% to 50% of the tokens of a layer. <i>Early until sigma</i> has no effect without an early ratio."
    )
    early = "Merges 75% of the tokens of a whole block while sigma is above 3, then 20% to 50% of a layer."
    assert explained(early_modules=["block"]) == early
    assert explained(modules=["block"]) == first.replace("layer", "whole block") + "."
    assert "<i>Early merge in</i> has no effect" in explained(early_modules=["block"], early_ratio="off")
    assert explained(start=0.25) == first + "; only from 25% to 100% of the noise schedule."
    moved = {"floor": 0.1, "batch_rule": "max", "pool": 2.0, "neighbourhood": 4, "random": True}
    noted = explained(threshold=0.0, **moved)
    assert all(f"<i>{f.label}</i> has no effect" in noted for f in table if f.name in moved)
    assert set(moved) <= set(ui.EXPLAINED)
    (heard,) = [event["fn"] for name, event in by_id["script_txt2img_tome_sampler_pool"].events if name == "change"]
    assert "<i>Pool size</i>" in heard(*[2.0 if c.elem_id.endswith("_pool") else c.value for c in host.components])
    assert explained(ratio=0) == "Merges nothing in any part of the run: the ratio is 0."
    assert explained(start=1.0) == "Merges nothing: it ends where it starts."
    assert "it must be a number from 0 to 0.75" in explained(ratio=0.9)
    assert "early_ratio is &#x27;lots&#x27;; it must be a number from 0 to 0.99" in explained(early_ratio="lots")
    preset = by_id["script_txt2img_tome_sampler_preset"]
    (write,) = [event["fn"] for name, event in preset.events if name == "input"]
    written = dict(zip((f.name for f in table), write("Fast"), strict=True))
    assert written == {
        **{f.name: {"value": f.shown(MergeConfig.preset("fast"))} for f in table},
        "ratio": {"value": 0.75, "maximum": 0.75},
    }
    assert (written["early_ratio"], written["early_sigma"]) == ({"value": "0.9"}, {"value": 3.0})
    host.app.presets.save("wide", MergeConfig(ratio=0.9, stride=4))
    written = dict(zip((f.name for f in table), write("wide"), strict=True))
    assert written["ratio"] == {"value": 0.9, "maximum": 0.9375}
    assert written["stride"] == {"value": 4}
    assert dict(zip((f.name for f in table), write("ToMe-SD"), strict=True))["early_ratio"] == {"value": "off"}
    keys = [field.label for field in host.fields]
    assert keys == host.script.paste_field_names
    pasted = {"ToMe Sampler": "Fast", "ToMe presets": "2", "ToMe seed": "5"}
    assert [field.function(pasted) for field in host.fields][0:2] == [True, "Fast"]
    host.tell("infotext_pasted", "", pasted)
    assert pasted["ToMe seed"] == 5
    assert (pasted["ToMe ratio"], pasted["ToMe early ratio"]) == (0.75, "0.9")
    old = {"ToMe Sampler": "Fast", "ToMe seed": "5"}  # of before the early part
    for _ in range(2):  # hosts without named paste fields read what is spelt out already
        assert [field.function(old) for field in host.fields][0:2] == [True, "Custom"]
        host.tell("infotext_pasted", "", old)
        assert (old["ToMe ratio"], old["ToMe early ratio"], old["ToMe seed"]) == (0.9, "off", 5)


def test_a_hires_preset_keeps_all_it_sets_when_one_of_its_sliders_moves(host: Host) -> None:
    names, asked = host.app.ui.element_names(), [c.value for c in host.components]
    at = names.index("hires_preset")
    (write,) = [event for name, event in host.components[at].events if name == "input"]
    by_id = {c.elem_id: c.elem_id for c in host.components}
    assert len(by_id) == len(names)
    places = [next(i for i, c in enumerate(host.components) if c is one) for one in write["inputs"]]
    asked[0] = asked[names.index("hires-checkbox")] = True
    asked[names.index("preset")], asked[names.index("seed")] = "Custom", 5
    read = sys.modules["tome_sampler_extension.request"].read_args
    host.app.presets.save("mine", MergeConfig(ratio=0.3, metric="position", seed=7))
    for name, config in (
        ("ToMe-SD", MergeConfig.preset("tomesd")),
        ("mine", MergeConfig(ratio=0.3, metric="position", seed=7)),
    ):
        asked[at] = name
        asked[at + 1 :] = [update["value"] for update in write["fn"](*(asked[place] for place in places))]
        found = read(asked, host.app.presets.saved())
        assert (found.hires_preset, found.hires) == (name, config)
        asked[at], asked[at + 1] = "Custom", 0.45  # as the page does
        assert read(asked).hires == config.with_(ratio=0.45)
    asked[at], asked[names.index("ratio")] = "ToMe-SD", "what cannot be read"
    assert write["fn"](*(asked[place] for place in places))[0]["value"] == 0.5


def test_what_a_preset_sets_is_not_kept_by_the_host(host: Host) -> None:
    """It writes each control's first default into ui-config.json and shows that for ever after, whatever the presets
    and our own setting have become."""
    kept = [c.elem_id.split("tome_sampler_")[1] for c in host.components if not hasattr(c, "do_not_save_to_config")]
    assert kept == ["enabled-checkbox", "hires-checkbox", "hires_preset"]
