"""The embedded model and `tome-sampler demo`."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import tome_sampler
from tome_sampler import MergeConfig, demo
from tome_sampler.cli import main
from tome_sampler.demo import train
from tome_sampler.demo.compare import sample
from tome_sampler.demo.model import LATENT_SIZE, to_latent, to_picture
from tome_sampler.demo.report import fidelity
from tome_sampler.demo.scenes import CaptionError, parse_caption, random_scene, scene_from_caption

PROMPT = "a large red circle at the top left, a small blue cross in the middle on striped teal"


def test_captions_say_all_of_a_scene() -> None:
    rng = random.Random(0)
    for _ in range(200):
        scene = random_scene(rng)
        assert scene_from_caption(scene.caption) == scene


def test_an_unknown_word_is_told_with_the_vocabulary() -> None:
    with pytest.raises(CaptionError, match="does not know 'elephant'; it knows: circle"):
        parse_caption("a large elephant at the top on plain grey")
    with pytest.raises(CaptionError, match="needs a size"):
        scene_from_caption("a red circle at the top on plain grey")


def test_pictures_and_latents_are_the_same_thing() -> None:
    picture = torch.rand(2, 3, 128, 128) * 2 - 1
    assert to_latent(picture).shape == (2, 12, LATENT_SIZE, LATENT_SIZE)
    assert torch.equal(to_picture(to_latent(picture)), picture)


def test_load_model_gives_one_object_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    model = demo.load_model()
    assert model is demo.load_model(device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert demo.denoiser().inner_model is model
    assert sum(1 for name, _ in model.named_modules() if name.endswith("attn1")) == 13
    assert demo.WEIGHTS.stat().st_size <= 12_000_000


def test_a_missing_or_broken_weight_file_is_told_in_one_line(tmp_path: Path) -> None:
    broken, other = tmp_path / "broken.safetensors", tmp_path / "other.safetensors"
    broken.write_bytes(b"no weights")
    tensors = load_file(demo.WEIGHTS)
    from safetensors.torch import save_file

    save_file({k: tensors[k] for k in list(tensors)[:-1]}, other)
    for path, message in (
        (tmp_path / "none.safetensors", "weights are missing"),
        (broken, "not a readable safetensors file"),
        (other, "does not hold the embedded model's weights"),
    ):
        with pytest.raises(demo.WeightsError, match=message) as error:
            demo.load_model(path)
        assert "\n" not in str(error.value)


def test_timesteps_are_those_of_the_denoiser() -> None:
    sigma = torch.tensor([0.03, 0.5, 2.0, 20.0])
    torch.testing.assert_close(train.timestep_of(sigma), demo.denoiser().sigma_to_t(sigma), atol=0.2, rtol=0)


def test_training_that_was_stopped_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        train,
        "CURRICULUM",
        (train.Stage(True, 64, 2.0, 2, 3, 1e-3, 1e-3), train.Stage(False, 16, 1.0, 1, 3, 1e-3, 1e-4)),
    )
    train.train(tmp_path / "whole", seed=0, stop_at=4)
    train.train(tmp_path / "parts", seed=0, stop_at=2)
    train.train(tmp_path / "parts", seed=0, stop_at=4)
    whole, parts = (load_file(tmp_path / run / "weights.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_merged_pictures_are_near_the_plain_ones() -> None:
    """The README states the fidelity of whole runs; here ten steps must reach 30 dB, and more than tomesd's rule."""
    settings = {"steps": 10, "sampler": "dpmpp_2m", "cond_scale": 3.0, "seed": 1}
    plain = sample(PROMPT, None, **settings)
    ours, theirs = (sample(PROMPT, MergeConfig.preset(name), **settings) for name in ("default", "tomesd"))
    assert fidelity(ours.picture, plain.picture)[0] > max(30, fidelity(theirs.picture, plain.picture)[0] + 3)
    assert ours.stats["merged_fraction"] > 0.3


def test_demo_writes_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path), "--prompt", PROMPT, "--steps", "4", "--sampler", "euler"]) == 0
    data = json.loads((tmp_path / "report.json").read_text())
    keys = {"seconds_plain", "seconds_merged", "speedup", "psnr", "ssim", "merged_fraction"}
    assert keys <= data["overall"].keys()
    assert keys <= data["prompts"][0].keys()
    assert MergeConfig.from_dict(data["settings"]["config"]) == MergeConfig.preset("default")
    assert data["versions"]["tome_sampler"] == tome_sampler.__version__
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 5 * 256
    assert "sheet.png" in (tmp_path / "report.md").read_text()
    assert "all (medians)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "0.9"], "ratio is 0.9; it must be a number from 0 to 0.75"),
        (["--threshold", "3"], "threshold is 3.0; it must be a number from -1 to 1"),
        (["--steps", "1"], "steps is 1; it must be at least 2"),
        (["--sampler", "eular"], "sampler is 'eular'; k-diffusion has"),
        (["--prompt", "a cat"], "does not know 'cat'"),
    ],
)
def test_what_the_user_gets_wrong_is_said_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--quiet", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]])
def test_help_teaches(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert "tome-sampler demo" in capsys.readouterr().out
