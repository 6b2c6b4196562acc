"""The size gate: which layers are left alone because merging them would not pay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_unet
from test_session import one, tokens

from tome_sampler import MergeConfig, MergeSession, gate, merging
from tome_sampler.bench.calibrate import _first, calibrate
from tome_sampler.bench.methods import KeptSession
from tome_sampler.cli import main
from tome_sampler.matching import global_match
from tome_sampler.refresh import Always, Drift, EverySteps, Once, SigmaRatio
from tome_sampler.session import Layer

ROW = {"device": "cpu", "backend": "auto", "dtype": "float32", "channels": 320, "kept": 100, "always": 400}


def least(channels: int = 320, dtype: torch.dtype = torch.float32, device: str = "cpu", **more: Any) -> int:
    return gate.least_tokens(channels, dtype, device, more.get("ratio", 0.5), more.get("always", False))


def test_the_built_in_table_is_one_and_its_gates_open_with_width() -> None:
    rows = json.loads(gate.BUILT_IN.read_text())["rows"]
    assert rows
    assert all(gate._is_row(row) for row in rows)
    for dtype in (torch.float32, torch.bfloat16):
        found = [least(channels, dtype) for channels in (48, 320, 640, 1280)]
        assert found == sorted(found, reverse=True)
        assert all(least(c, dtype, always=True) >= least(c, dtype) for c in (48, 320, 640, 1280))


def test_a_calibration_lies_where_caches_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert gate.own_table() == tmp_path / "tome-sampler" / "gate.json"


def test_a_calibration_of_ones_own_takes_the_built_in_ones_place(
    calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "BUILT_IN", calibration.with_name("none.json"))
    gate.write_table(calibration, {"device": "this one"}, [ROW])
    assert (least(), least(always=True)) == (100, 400)
    assert least(channels=64, dtype=torch.float16) == 100  # the nearest that it has
    gate.write_table(calibration, {}, [{**ROW, "dtype": "bfloat16", "kept": 50}])
    assert (least(), least(dtype=torch.bfloat16)) == (100, 50)  # other rows stay
    gate.write_table(calibration, {}, [{**ROW, "kept": 70}])
    assert (least(), least(dtype=torch.bfloat16)) == (70, 50)


def test_built_in_rows_stay_for_what_was_not_calibrated(calibration: Path) -> None:
    """For other precisions and devices of a machine that was calibrated for one."""
    built_in = {channels: least(channels, torch.bfloat16) for channels in (48, 320, 640, 1280)}
    gate.write_table(calibration, {}, [{**ROW, "kept": 7}, {**ROW, "device": "cuda", "backend": "flash", "kept": 9}])
    assert least() == least(channels=48) == 7  # its own, at any width
    assert least(device="cuda") == 9
    assert {channels: least(channels, torch.bfloat16) for channels in built_in} == built_in
    assert len(json.loads(calibration.read_text())["rows"]) == 2  # the file is of this machine


def test_devices_that_were_not_measured_have_a_gate() -> None:
    assert least(device="cuda") == gate.UNMEASURED["cuda"]
    assert least(device="mps") == gate.OTHERS


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [1]}', '{"rows": [{"device": "cpu"}]}', '{"rows": 7}'])
def test_a_broken_table_is_no_table(calibration: Path, text: str) -> None:
    expected = least()
    calibration.parent.mkdir(parents=True)
    calibration.write_text(text)
    gate.forget()
    assert least() == expected
    gate.write_table(calibration, {}, [ROW])
    assert least() == 100


def test_less_merging_needs_longer_sequences(calibration: Path) -> None:
    gate.write_table(calibration, {}, [ROW])
    found = [least(ratio=ratio) for ratio in (0.9, 0.5, 0.3, 0.1, 0.01)]
    assert found == sorted(found)
    assert found[:2] == [100, 100]
    assert least(ratio=0.1) == pytest.approx(100 * 0.75 / 0.19, abs=1)


def test_a_session_leaves_short_layers_alone_and_says_so_once(calibration: Path) -> None:
    gate.write_table(calibration, {}, [{**ROW, "kept": 64, "always": 65}])
    policies = {Once(): True, SigmaRatio(4): True, EverySteps(5): True}
    policies |= {Always(): False, EverySteps(1): False, SigmaRatio(1.01): False, Drift(0.0): False}  # nearly each call
    for policy, merged in policies.items():
        session = MergeSession(MergeConfig(threshold=None, refresh=policy))
        for _ in range(2):
            assert (one(session, tokens()) is not None) == merged  # 64 tokens
        assert len(session.stats.notes) == (not merged)
        assert all("64 tokens are left alone: on cpu merging pays from 65" in note for note in session.stats.notes)
    assert one(MergeSession(MergeConfig(refresh=Always(), min_tokens=0)), tokens()) is not None


def test_under_autocast_the_precision_of_the_attention_decides(calibration: Path) -> None:
    """Norms give fp32 there, and attention takes less."""
    gate.write_table(calibration, {}, [{**ROW, "kept": 1}, {**ROW, "dtype": "bfloat16", "kept": 65, "always": 65}])
    config, x = MergeConfig(threshold=None), tokens()  # 64 of them
    assert one(MergeSession(config), x) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert one(MergeSession(config), x) is None
        assert gate.computed_in(torch.float64, "cpu") == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert one(MergeSession(config), x) is not None
    assert gate.computed_in(torch.float32, "meta") == torch.float32


ALIKE = MergeConfig(ratio=0.5, threshold=0.9, floor=0.0, early_ratio=None, importance=0.0, refresh=Always())
ON_ITS_OWN = {"branches": ("cond",), "size": (32, 32)}


def some_alike(share: float, n: int = 1024) -> torch.Tensor:
    """Tokens (1 n 32) of which about a share are alike, the others at random."""
    x = torch.randn(1, n, 32)
    return torch.where(torch.rand(1, n, 1) < share, torch.ones(32), x)


@pytest.mark.parametrize(("share", "least_tokens", "merged"), [(0.0, 1, False), (0.2, 1, True), (0.2, 1000, False)])
def test_a_match_that_would_not_pay_is_not_made(
    calibration: Path, monkeypatch: pytest.MonkeyPatch, share: float, least_tokens: int, merged: bool
) -> None:
    """How many pass a threshold is known from a sample, and it costs no match."""
    gate.write_table(calibration, {}, [{**ROW, "kept": least_tokens, "always": least_tokens}])
    matches: list[int] = []
    monkeypatch.setattr("tome_sampler.session.global_match", lambda x, dst: matches.append(1) or global_match(x, dst))
    session, x = MergeSession(ALIKE), some_alike(share)
    assert (one(session, x, **ON_ITS_OWN) is not None) == merged
    assert len(matches) == merged
    assert not session.stats.notes
    assert (one(MergeSession(ALIKE.with_(min_tokens=0)), x, **ON_ITS_OWN) is not None) == (share > 0)  # without a gate
    assert one(MergeSession(ALIKE.with_(floor=0.5)), x, **ON_ITS_OWN) is not None, "so many merge in any case"
    assert len(matches) == merged + 2


def test_a_layer_is_asked_again_when_new_pairs_are_due(calibration: Path) -> None:
    gate.write_table(calibration, {}, [{**ROW, "kept": 1, "always": 1}])
    session = MergeSession(ALIKE.with_(refresh=SigmaRatio(4)))
    run = [(0.0, 9.0), (1.0, 8.0), (1.0, 2.0), (0.0, 1.9), (0.0, 0.4)]
    found = [one(session, some_alike(share), sigma, **ON_ITS_OWN) for share, sigma in run]
    assert [pairing is not None for pairing in found] == [False, False, True, True, False]


def test_where_drift_is_measured_a_layer_is_asked_again_when_sigma_has_halved(calibration: Path) -> None:
    """What was left alone does not drift."""
    gate.write_table(calibration, {}, [{**ROW, "kept": 1, "always": 1}])
    session = MergeSession(ALIKE.with_(refresh=Drift(0.1)))
    run = [(0.0, 9.0), (1.0, 8.0), (1.0, 4.0), (1.0, 0.4)]
    found = [one(session, some_alike(share), sigma, **ON_ITS_OWN) for share, sigma in run]
    assert [pairing is not None for pairing in found] == [False, False, True, True]
    assert [sum(layer.pairings_made for layer in call.layers.values()) for call in session.stats.calls] == [0, 0, 1, 0]


def test_where_the_most_that_may_merge_does_not_pay_nothing_is_sampled(
    calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As later in a run whose early part merges more, and pays."""
    gate.write_table(calibration, {}, [{**ROW, "kept": 700, "always": 700}])
    monkeypatch.setattr("tome_sampler.session.share_above", None)
    config = ALIKE.with_(ratio=0.1, early_ratio=0.9, early_sigma=5.0)
    session = MergeSession(config)
    found = [one(session, some_alike(1.0), sigma, **ON_ITS_OWN) for sigma in (9.0, 4.0)]
    assert [pairing is not None for pairing in found] == [True, False]


def test_a_batch_of_which_one_image_merges_is_merged(calibration: Path) -> None:
    """Though its sequence is as long as before: the picture is another one."""
    gate.write_table(calibration, {}, [{**ROW, "kept": 100, "always": 100}])
    session = MergeSession(ALIKE)
    x = torch.cat([some_alike(0.5), some_alike(0.0)])
    pairing = one(session, x, **ON_ITS_OWN)
    assert pairing is not None
    assert session.stats.merged
    session.take_back(Layer("x", 0), x, pairing)
    assert not session.stats.merged


@pytest.mark.parametrize("search", ["global", "local"])
def test_each_image_of_a_batch_is_asked_for_itself(calibration: Path, search: str) -> None:
    """One that would be left alone by itself stays as it is beside one that merges."""
    gate.write_table(calibration, {}, [{**ROW, "kept": 100, "always": 100}])
    x = torch.cat([some_alike(0.02), some_alike(0.5), some_alike(0.0)])
    config = ALIKE.with_(search=search)
    together = one(MergeSession(config), x, **ON_ITS_OWN)
    assert together is not None
    for row, alone in enumerate(one(MergeSession(config), x[row : row + 1], **ON_ITS_OWN) for row in range(3)):
        rows = together.unmerge(together.merge(x))[row]
        assert (alone is not None) == (row == 1)
        torch.testing.assert_close(rows, x[row] if alone is None else alone.unmerge(alone.merge(x[row : row + 1]))[0])
    assert one(MergeSession(config), x[[0, 2]], **ON_ITS_OWN) is None


@pytest.mark.parametrize("least_tokens", [1, 1000])
def test_a_compiled_model_has_the_same_gate(calibration: Path, least_tokens: int) -> None:
    gate.write_table(calibration, {}, [{**ROW, "kept": least_tokens, "always": least_tokens}])
    unet, x = tiny_unet(), torch.randn(2, 4, 16, 16)
    context = torch.randn(2, 5, 8)
    torch._dynamo.reset()
    config = MergeConfig(threshold=None)
    with torch.no_grad(), merging(unet, config, branches=("uncond", "cond")) as session:
        eager = unet(x, torch.tensor(500), context).sample
        session.reset()
        compiled = torch.compile(unet, backend="eager", fullgraph=True)(x, torch.tensor(500), context).sample
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-5)
        assert (session.stats.to_dict()["merged_fraction"] > 0) == (least_tokens == 1)


def test_calibrating_gives_a_row_for_each_width() -> None:
    rows = calibrate(
        torch.device("cpu"), torch.float32, repeats=1, widths=((16, 2), (32, 2)), sides=(4, 32), progress=False
    )
    assert [row["channels"] for row in rows] == [16, 32]
    assert all(gate._is_row(row) for row in rows)
    assert all(row[key] in (16, 1024, 2048) for row in rows for key in ("kept", "always"))


def test_calibrating_times_calls_that_reuse_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kept match costs is not the cost of another one."""
    sessions: list[MergeSession] = []

    class Seen(KeptSession):
        def __init__(self, config: MergeConfig) -> None:
            super().__init__(config)
            sessions.append(self)

    monkeypatch.setattr("tome_sampler.bench.calibrate.KeptSession", Seen)
    calibrate(torch.device("cpu"), torch.float32, repeats=1, widths=((16, 2),), sides=(64,), progress=False)
    made = [[layer.pairings_made for call in s.stats.calls for layer in call.layers.values()] for s in sessions]
    always, kept = made
    assert len(always) == len(kept) == 2 * 2  # rounds, and calls in each
    assert all(always)
    assert [bool(count) for count in kept] == [True, False, False, False]


def test_it_pays_from_where_it_always_does() -> None:
    sides = (8, 12, 16)
    assert _first(sides, [True, False, True]) == 256
    assert _first(sides, [False, True, True]) == 144
    assert _first(sides, [True, True]) == 64  # longer ones were not tried: both paid
    assert _first(sides, [True, False, False]) == 512


def test_the_command_keeps_what_it_finds(
    calibration: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tome_sampler.bench.calibrate.calibrate", lambda *_, **__: [ROW])
    assert main(["bench", "--calibrate", "--quiet"]) == 0
    assert least() == 100
    assert str(calibration) in capsys.readouterr().out
    assert main(["bench", "--calibrate", "--dtype", "int8"]) == 2
    assert "dtype is 'int8'; it must be one of fp32, bf16, fp16" in capsys.readouterr().err


def test_a_ratio_that_merges_next_to_nothing_never_pays() -> None:
    assert least(ratio=1e-17) > 10**6


def test_a_machine_without_a_home_has_no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what it gives where there is none
    gate.forget()
    assert least() > 0
    gate.forget()


LONE = [
    # channels, tokens, device, modules, early modules, policy; whether it merges
    (320, 4096, "cpu", ("ff",), None, Once(), True),
    (320, 4096, "cpu", ("attn2",), None, Once(), True),
    (320, 256, "cpu", ("ff",), None, Once(), False),  # a match costs more than it saves
    (320, 128**2, "cpu", ("attn2",), None, Once(), False),  # the match grows with the square
    (320, 128**2, "cpu", ("ff",), None, Once(), True),
    (320, 128**2, "cpu", ("attn2", "ff"), None, Once(), True),  # share their pairs
    (48, 4096, "cpu", ("ff",), None, Once(), False),
    (48, 4096, "cpu", ("attn1", "ff"), None, Once(), True),  # attention's pairs are there
    (320, 4096, "cpu", ("attn2",), None, Always(), False),
    (320, 4096, "meta", ("attn2",), None, Once(), False),  # nobody has measured it
    (48, 4096, "cpu", ("ff",), ("attn1", "ff"), Once(), False),  # in the later part it is alone
    (48, 4096, "cpu", ("attn1", "ff"), ("ff",), Once(), False),
]


@pytest.mark.parametrize(("channels", "n", "device", "modules", "early", "policy", "merged"), LONE)
def test_what_merges_without_attention_must_pay_for_its_match(
    channels: int, n: int, device: str, modules: Any, early: Any, policy: Any, merged: bool
) -> None:
    config = MergeConfig(threshold=None, modules=modules, early_modules=early, refresh=policy)
    for auto, left_alone in ((config, not merged), (config.with_(min_tokens=0), False)):
        session = MergeSession(auto)
        for part in set(modules) & {"ff", "attn2"}:
            found = session.too_short(Layer(f"block.{part}", 0), n, channels, torch.float32, device)
            assert found == left_alone
        assert bool(session.stats.notes) == left_alone
    if "attn1" in modules:
        assert not MergeSession(config).too_short(Layer("block.attn1", 0), n, channels, torch.float32, device)


def test_little_merging_pays_at_fewer_lengths() -> None:
    assert gate.pays_alone("ff", 1024, 320, "cpu", 0.5, False)
    assert not gate.pays_alone("ff", 1024, 320, "cpu", 0.25, False)
    assert not gate.pays_alone("attn2", 9216, 320, "cpu", 0.25, False)
