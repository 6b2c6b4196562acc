"""``tome-sampler inspect``: what it sees is what is there, and its proposal does what it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from PIL import Image
from torch import Tensor

from tome_sampler import Layer, MergeConfig, ModelCall
from tome_sampler.cli import main
from tome_sampler.inspect.probe import BINS, Look, Probe, Watched, probing
from tome_sampler.inspect.tune import merged_share, propose, reuse
from tome_sampler.models.embedded import EmbeddedModel
from tome_sampler.models.run import Settings, sample
from tome_sampler.profiles import read_profile
from tome_sampler.refresh import Always, SigmaRatio

PROMPT = "a large red ring in the middle on wavy navy"
CONFIG = MergeConfig(min_tokens=0, threshold=0.9, floor=0.0, early_ratio=None, importance=0.0)
LAYER = Layer("attn1", 0)


def look_at(*metrics: Tensor, config: MergeConfig = CONFIG) -> Probe:
    """A probe that has seen a layer's tokens on an 8 x 8 grid, at falling noise."""
    probe = Probe(config)
    for step, metric in enumerate(metrics):
        with probe.call(ModelCall(10.0 / 2**step, (8, 8), ("cond",), (0,))):
            assert probe.merge(LAYER, metric) is None  # the run stays plain
    return probe


def cells(seed: int) -> Tensor:
    """(1 64 16) tokens, alike within each 2 x 2 cell."""
    tokens = torch.randn(4, 4, 16, generator=torch.Generator().manual_seed(seed))
    return tokens.repeat_interleave(2, 0).repeat_interleave(2, 1).reshape(1, 64, 16)


def test_histograms_and_shares_are_those_of_the_tokens() -> None:
    alike, apart = cells(0), torch.randn(1, 64, 256, generator=torch.Generator().manual_seed(1))
    first, second = (probe.calls[0].layers["attn1"] for probe in (look_at(alike), look_at(apart)))
    assert first.tokens == 64
    assert sum(first.histogram) == pytest.approx(1)
    assert first.histogram[-1] == pytest.approx(1)  # every source has its double
    assert first.merged == 0.5  # the ratio
    assert sum(second.histogram[: BINS * 3 // 4]) == pytest.approx(1)  # none above 0.5
    assert second.merged == 0


def test_jaccard_distance_is_between_the_pairs_of_adjacent_calls() -> None:
    ratio = CONFIG.with_(threshold=None)
    same = look_at(cells(0), cells(0), config=ratio).calls
    assert [call.layers["attn1"].jaccard for call in same] == [None, 0.0]
    generator = torch.Generator().manual_seed(0)
    apart = look_at(*(torch.randn(1, 64, 16, generator=generator) for _ in range(2)), config=ratio).calls
    distance = apart[1].layers["attn1"].jaccard
    assert distance is not None
    assert 0.5 < distance <= 1


def test_what_pairs_keep_is_followed() -> None:
    calls = look_at(cells(0), cells(0), torch.randn(1, 64, 16), config=CONFIG.with_(threshold=None)).calls
    kept = [call.layers["attn1"].kept for call in calls]
    assert kept[0] == pytest.approx([1.0])
    assert kept[1] == pytest.approx([1.0, 1.0])
    assert kept[2][0] < 0.3 < kept[2][2]  # old pairs have come apart, new ones are the best that there are


def test_a_call_sees_what_the_run_would_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size gate asks how many calls a match serves, and the run's own policy says so. What it leaves alone has
    pairs that are followed all the same; where no token passes there are none."""
    asked: list[bool] = []
    monkeypatch.setattr(
        "tome_sampler.session.least_tokens",
        lambda *args: (asked.append(args[-1]), 65 if args[-1] or args[3] < 0.3 else 1)[1],
    )
    config = CONFIG.with_(min_tokens="auto", threshold=0.9, floor=0.0, refresh=SigmaRatio(4.0))
    config = config.with_(threshold=0.99)
    none, few = torch.randn(1, 64, 16), torch.randn(1, 64, 16)
    few[:, :12] = 1.0  # eight of them are sources
    calls = look_at(few, cells(0), cells(0), none, config=config).calls
    assert not any(asked)
    assert [call.layers["attn1"].merged for call in calls] == [0, 0.5, 0.5, 0]
    first, second, third, last = (call.layers["attn1"].kept for call in calls)
    assert first == pytest.approx([1.0])
    assert second[1] == third[1] == third[2] == pytest.approx(1.0)
    assert last[3] is None
    lost, made = reuse(calls, config, SigmaRatio(12.0))
    assert made == 0.25
    assert lost == pytest.approx(2 / 3 * (1 - second[0]))  # type: ignore[operator]


def watched(sigma: float, similarity: float, kept: list[float | None]) -> Watched:
    histogram = [0.0] * BINS
    histogram[round((similarity + 1) * BINS / 2)] = 1.0
    return Watched(sigma, {"a": Look(64, histogram, 0.5, None, kept)})


def test_a_proposal_merges_the_share_and_keeps_pairs_as_long_as_they_last() -> None:
    # sources alike to 0.9 in the first call and to 0.5 in the second; pairs lose 0.1 each time sigma halves
    calls = [watched(8, 0.9, [0.9]), watched(4, 0.5, [0.8, 0.9]), watched(2, 0.5, [0.7, 0.8, 0.9])]
    config = MergeConfig(ratio=0.5, floor=0.0, early_ratio=None)
    assert merged_share(calls, config, 0.95) == 0
    assert merged_share(calls, config, 0.8) == pytest.approx(0.5 / 3)
    assert merged_share(calls, config, 0.4) == pytest.approx(0.5)
    assert merged_share(calls, config.with_(floor=0.2), 0.95) == pytest.approx(0.2)
    assert reuse(calls, config, SigmaRatio(1.5)) == (pytest.approx(0), 1.0)
    assert reuse(calls, config, SigmaRatio(4.0)) == (pytest.approx(0.1 / 3), pytest.approx(2 / 3))
    found = propose(calls, config, 0.16, 0.04)
    assert found.config.threshold == 0.9
    assert found.config.refresh == SigmaRatio(4.0)
    assert propose(calls, config, 0.4, 0.5).config.threshold == 0.5
    close = [watched(8, 0.9, [0.9]), watched(7, 0.9, [0.8, 0.9])]  # within the shortest life that is tried
    assert propose(close, config, 0.4, 0.01).config.refresh == Always()
    # with an early part the first call, which no threshold acts in, is left out, and pairs do not outlive it
    early = config.with_(early_ratio=0.75, early_sigma=6.0)
    assert propose(calls, early, 0.16, 0.04).config.threshold == 0.5
    assert reuse(calls, early, SigmaRatio(4.0)) == (pytest.approx(0.1 / 3), pytest.approx(2 / 3))
    assert reuse(calls, early, SigmaRatio(12.0))[1] == pytest.approx(2 / 3)
    assert reuse(calls, config, SigmaRatio(12.0))[1] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="the share to merge is"):
        propose(calls, config, 0.6, 0.1)
    for loss in (float("nan"), -0.1, 3.0):
        with pytest.raises(ValueError, match=r"the similarity that may be lost is .*; it must be from 0 to 2"):
            propose(calls, config, 0.4, loss)
    with pytest.raises(ValueError, match="nothing to tune"):
        propose([Watched(1.0)], config, 0.4, 0.1)


def test_a_probed_run_is_the_plain_run_and_leaves_nothing() -> None:
    model, settings = EmbeddedModel(), Settings((64, 64), 3)
    config = MergeConfig(min_tokens=0)
    plain = sample(model, [PROMPT], [0], settings).pictures
    probed = sample(model, [PROMPT], [0], settings, lambda levels: probing(model.module, config, levels))
    assert torch.equal(probed.pictures, plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.module.modules())


def test_the_embedded_model_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--steps", "4", "--size", "64", "--set", "min_tokens=0", "--tune", "--quiet", "--seed", "3"]
    assert main(["inspect", PROMPT, *options, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "3 merged layers, 4 model calls" in said
    assert "proposed: threshold=" in said
    data = json.loads((tmp_path / "inspect.json").read_text())
    assert len(data["calls"]) == 4
    assert all(len(call["layers"]) == 3 for call in data["calls"])
    assert data["merged"]["merged_fraction"] > 0.2
    assert data["merged"]["psnr"] > 15
    names = {f"{name}.png" for name in ("similarity", "jaccard", "tokens", "maps", "tune")}
    assert names == {path.name for path in tmp_path.glob("*.png")}
    for name in names:
        assert min(Image.open(tmp_path / name).size) > 100
    profile = read_profile(tmp_path / "profile.json")
    assert profile == MergeConfig.from_dict(data["tuned"]["config"])
    assert profile.min_tokens == 0
    draw = ["generate", PROMPT, "--profile", str(tmp_path / "profile.json"), "--steps", "3", "--size", "64", "--quiet"]
    assert main([*draw, "--out", str(tmp_path / "drawn")]) == 0


def test_a_pipelines_own_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipelines.sd().save_pretrained(tmp_path / "model")
    options = [
        "--model",
        str(tmp_path / "model"),
        "--scheduler",
        "--size",
        "64",
        "--steps",
        "3",
        "--set",
        "min_tokens=0",
    ]
    assert main(["inspect", "a b", *options, "--quiet", "--out", str(tmp_path)]) == 0
    assert "5 merged layers, 3 model calls" in capsys.readouterr().out


def test_a_video_is_looked_at_by_its_pipeline() -> None:
    pipe = pipelines.animate()
    given = {"num_inference_steps": 2, "num_frames": 2, "height": 64, "width": 64, "output_type": "latent"}
    with probing(pipe, CONFIG) as probe:
        for _ in range(2):  # a second run is a fresh one
            pipe("a b", **given)
            assert len(probe.calls) == 2
            assert all(len(call.layers) == 5 for call in probe.calls)


def test_a_clip_is_looked_at_and_settings_are_proposed_for_it(tmp_path: Path) -> None:
    pipelines.animate().save_pretrained(tmp_path / "model")
    given = ["--model", str(tmp_path / "model"), "--size", "64", "--frames", "2", "--steps", "3"]
    options = ["--set", "min_tokens=0", "--tune", "--quiet", "--out", str(tmp_path)]
    assert main(["inspect", "a b", *given, *options]) == 0
    data = json.loads((tmp_path / "inspect.json").read_text())
    assert data["settings"]["frames"] == 2
    assert all(len(call["layers"]) == 5 for call in data["calls"])
    assert data["merged"]["stats"]["merged_fraction"] > 0.2
    assert (tmp_path / "maps.png").stat().st_size > 1000
    assert read_profile(tmp_path / "profile.json").threshold == data["tuned"]["config"]["threshold"]


def test_what_merges_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--steps", "2", "--size", "64", "--set", "min_tokens=5000", "--quiet"]
    assert main(["inspect", PROMPT, *options, "--out", str(tmp_path / "out")]) == 2
    assert "nothing of embedded is merged with these settings" in capsys.readouterr().err
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--tune", "--share", "0.6", "--set", "ratio=0.5"], "the share to merge is 0.6; it must be above 0 and at"),
        (["--tune", "--loss", "nan"], "the similarity that may be lost is nan"),
        (["--tune", "--loss", "-1"], "the similarity that may be lost is -1"),
        (["--share", "0.2"], "--share and --loss are what --tune aims at"),
        (["--loss", "0.1"], "--share and --loss are what --tune aims at"),
        (["--sampler", "euler", "--scheduler"], "--sampler and --scheduler are both given"),
        (["--seed", str(2**64)], f"seed is {2**64}"),
        (["--cond-scale", "inf"], "cond_scale is inf"),
        (["--out", "a file"], "--out is a file; it cannot be made: File exists"),
        (["--out", "locked"], "--out is locked; it cannot be written into"),
        (["matplotlib"], "pip install 'tome-sampler[inspect]'"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_run(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was run")

    monkeypatch.setattr("tome_sampler.inspect.run.sample", run)
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != "locked")  # root may write everywhere
    monkeypatch.chdir(tmp_path)
    Path("a file").touch()
    if given == ["matplotlib"]:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        given = []
    assert main(["inspect", PROMPT, "--steps", "2", "--quiet", *given]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_figures_are_saved_before_their_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("tome_sampler.inspect.plots.similarities", fail)
    options = ["--steps", "3", "--size", "64", "--set", "min_tokens=0", "--tune", "--quiet", "--out", str(tmp_path)]
    assert main(["inspect", PROMPT, *options]) == 2
    assert "tuned" in json.loads((tmp_path / "inspect.json").read_text())
    assert read_profile(tmp_path / "profile.json").min_tokens == 0


def test_memory_that_runs_out_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr("tome_sampler.inspect.run.sample", fail)
    assert main(["inspect", PROMPT, "--quiet", "--out", str(tmp_path)]) == 2
    expected = "too little memory for this: take a smaller --size or --frames, or --dtype bf16"
    assert expected in capsys.readouterr().err
