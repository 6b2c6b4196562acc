"""``tome-sampler generate`` from the command line: what it draws, what its pictures carry, what it says."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pipelines
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tome_sampler import MergeConfig
from tome_sampler.cli import main
from tome_sampler.generate.command import add_arguments, request_of
from tome_sampler.generate.request import Request, read_png, write_png
from tome_sampler.models import Model, open_model
from tome_sampler.models.own_loop import calls_of, sample_in_pipeline
from tome_sampler.models.pipeline import PipelineModel
from tome_sampler.models.run import Noise, Settings, sample
from tome_sampler.profiles import read_profile, write_profile

PROMPT = "a large red ring in the middle on wavy navy"
QUICK = ["--steps", "3", "--quiet"]


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path))


def made(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of Stable Diffusion 1.5's layout, safetensors."""
    path = tmp_path_factory.mktemp("sd15")
    pipelines.sd().save_pretrained(path)
    return path


def test_the_embedded_model_plain_and_merged_and_again_from_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--size", "64", "--set", "min_tokens=0"]
    assert main(["generate", PROMPT, "--compare", "--out", str(tmp_path), "--seed", "7", *small, *QUICK]) == 0
    assert made(tmp_path) == ["0000-report.json", "0000-seed7-compare.png", "0000-seed7-plain.png", "0000-seed7.png"]
    said = capsys.readouterr().out
    assert "of the tokens merged" in said
    assert "dB" in said
    report = json.loads((tmp_path / "0000-report.json").read_text())
    assert report["pictures"][0]["merged_fraction"] > 0.2
    assert report["request"]["merging"] == MergeConfig(min_tokens=0).to_dict()
    assert (pixels(tmp_path / "0000-seed7.png") != pixels(tmp_path / "0000-seed7-plain.png")).any()
    assert Image.open(tmp_path / "0000-seed7-compare.png").width > 3 * 256  # small pictures are shown larger
    for name in ("0000-seed7", "0000-seed7-plain"):
        assert (
            main(["generate", "--from-png", str(tmp_path / f"{name}.png"), "--out", str(tmp_path / name), "--quiet"])
            == 0
        )
        assert made(tmp_path / name) == ["0000-report.json", "0000-seed7.png"]
        assert (pixels(tmp_path / name / "0000-seed7.png") == pixels(tmp_path / f"{name}.png")).all()
    changed = ["--from-png", str(tmp_path / "0000-seed7.png"), "--preset", "fast:ratio=0.7", "--set", "refresh=always"]
    assert main(["generate", *changed, "--out", str(tmp_path), "--quiet"]) == 0
    request = read_png(tmp_path / "0001-seed7.png")  # numbers go on
    assert json.loads((tmp_path / "0000-report.json").read_text()) == report
    assert json.loads((tmp_path / "0001-report.json").read_text())["pictures"][0]["merged"] == "0001-seed7.png"
    assert request.config == MergeConfig.preset("fast", ratio=0.7).with_(refresh=request.config.refresh)  # type: ignore[union-attr]
    assert request.config.refresh.kind == "always"  # type: ignore[union-attr]
    assert (request.steps, request.size, request.seed) == (3, (64, 64), 7)


def test_several_prompts_in_batches_are_the_pictures_that_they_are_alone(tmp_path: Path) -> None:
    prompts = [PROMPT, "a small blue cross in the middle on striped teal"]
    assert (
        main(["generate", *prompts, "--count", "2", "--batch", "3", "--out", str(tmp_path), "--size", "64", *QUICK])
        == 0
    )
    assert [name for name in made(tmp_path) if name.endswith(".png")] == [f"000{i}-seed{i}.png" for i in range(4)]
    again = tmp_path / "again"
    assert main(["generate", "--from-png", str(tmp_path / "0003-seed3.png"), "--out", str(again), "--quiet"]) == 0
    a, b = pixels(tmp_path / "0003-seed3.png").astype(int), pixels(again / "0000-seed3.png").astype(int)
    assert abs(a - b).max() <= 1


def test_from_a_picture(tmp_path: Path) -> None:
    source = tmp_path / "source.png"
    Image.fromarray(np.full((100, 300, 3), (20, 30, 90), dtype=np.uint8)).save(source)
    options = ["--image", str(source), "--strength", "0.3", "--steps", "10", "--quiet"]
    assert main(["generate", PROMPT, *options, "--out", str(tmp_path)]) == 0
    found = pixels(tmp_path / "0000-seed0.png").astype(float)
    assert abs(found.mean((0, 1)) - (20, 30, 90)).max() < 40  # still its colours
    assert read_png(tmp_path / "0000-seed0.png").strength == 0.3
    assert main(["generate", PROMPT, "--image", str(source), "--strength", "0.1", *QUICK]) == 2


def test_a_run_that_fails_says_what_it_has_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def fail_in_the_third(*args: Any, **kwargs: Any) -> Any:
        runs.append(args)
        if len(runs) == 3:
            raise RuntimeError("a cable was pulled")
        return sample(*args, **kwargs)

    monkeypatch.setattr("tome_sampler.generate.run.sample", fail_in_the_third)
    assert main(["generate", PROMPT, "--count", "4", "--size", "64", "--out", str(tmp_path), *QUICK]) == 2
    assert made(tmp_path) == ["0000-report.json", "0000-seed0.png", "0001-seed1.png"]
    pictures = json.loads((tmp_path / "0000-report.json").read_text())["pictures"]
    assert [row["merged"] for row in pictures] == ["0000-seed0.png", "0001-seed1.png"]


def test_numbers_go_on_after_four_digits(tmp_path: Path) -> None:
    for name in ("9999-seed0.png", "10000-seed0.png", "20240501-beach.png"):
        (tmp_path / name).touch()
    assert main(["generate", PROMPT, "--size", "64", "--out", str(tmp_path), *QUICK]) == 0
    assert {"10001-seed0.png", "10001-report.json"} < set(made(tmp_path))


def test_paths_in_a_picture_are_as_they_were_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole ones would tell whoever gets the picture of folders that are nobody's business."""
    Image.new("RGB", (8, 8)).save(tmp_path / "source.png")
    monkeypatch.chdir(tmp_path)
    options = ["--image", "source.png", "--strength", "0.7", "--size", "64", *QUICK]
    assert main(["generate", PROMPT, *options, "--out", "out"]) == 0
    assert str(tmp_path) not in json.dumps(asdict(read_png(Path("out/0000-seed0.png"))))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = ["generate", "--from-png", "../out/0000-seed0.png", "--out", "again", "--quiet"]
    assert main(again) == 2
    assert "there is no source.png" in capsys.readouterr().err
    assert main([*again, "--image", "../source.png"]) == 0


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("option", ["--image", "--from-png"])
@pytest.mark.parametrize("damage", ["cut", "broken", "huge", "text"])
def test_damaged_pictures_are_said_in_a_line(
    option: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)  # of two chunks
    Image.fromarray(noise).save(path)
    head, data, rest = path.read_bytes().partition(b"IDAT")
    size = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    path.write_bytes(
        {
            "cut": head + data + rest[:1000],
            "broken": head + data + rest.replace(b"IDAT", b"\0\0\0\0"),
            "huge": head[:8] + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b""),
            "text": b"no picture",
        }[damage]
    )
    given = ["generate", PROMPT, option, str(path), "--out", str(tmp_path / "out"), *QUICK]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(path) in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"prompts": ["a"], "count": "x"}, "count is 'x'; it must be int"),
        ({"prompts": ["a"], "count": True}, "count is True; it must be int"),
        ({"prompts": 5}, r"prompts is 5; it must be tuple\[str, ...\]"),
        ({"prompts": "abc"}, "prompts is 'abc'"),
        ({"prompts": ["a", 1]}, r"prompts is \['a', 1\]"),
        ({"prompts": ["a"], "size": 5}, "size is 5"),
        ({"prompts": ["a"], "size": [64]}, r"size is \[64\]"),
        ({"prompts": ["a"], "strength": None}, "strength is None; it must be float"),
        ({"prompts": ["a"], "merging": {"refresh": 5}}, "refresh is 5"),
        ({"prompts": ["a"], "merging": {"ratio": "much"}}, "ratio is 'much'"),
        ({"prompts": ["a"], "cond_scale": float("nan")}, "cond_scale is nan; it must be a finite number"),
        ({"prompts": []}, "there is no prompt"),
        ({}, "no prompts"),
    ],
)
def test_damaged_settings_are_said_in_a_line(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Request.from_data(data)
    assert "\n" not in str(error.value)


def test_what_is_given_replaces_what_a_picture_says(folder: Path, tmp_path: Path) -> None:
    def asked(request: Request, *given: str) -> Request:
        write_png([Image.new("RGB", (4, 4))], tmp_path / "a.png", request)
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        return request_of(parser.parse_args(["--from-png", str(tmp_path / "a.png"), *given]))

    own = Request(("a",), scheduler="DDIMScheduler", image="a.png")
    assert asked(own) == own
    assert (asked(own, "--sampler", "euler").scheduler, asked(own, "--strength", "0.2").strength) == (None, 0.2)
    file = Request(("a",), model="x.safetensors", model_config="some/name", sampler="euler")
    assert asked(file, "--scheduler").sampler is None
    assert asked(file, "--steps", "5").model_config == "some/name"
    assert asked(file, "--model", str(folder)).model_config is None
    with pytest.raises(ValueError, match="--strength is of a run that starts from a picture"):
        asked(file, "--strength", "0.2")


def test_a_profile_is_used(tmp_path: Path) -> None:
    config = MergeConfig.preset("fast", threshold=0.8)
    write_profile(tmp_path / "p.json", config, model="embedded", measured={})
    assert read_profile(tmp_path / "p.json") == config
    options = ["--profile", str(tmp_path / "p.json"), "--set", "floor=0.5", "--out", str(tmp_path), *QUICK]
    assert main(["generate", PROMPT, *options]) == 0
    assert read_png(tmp_path / "0000-seed0.png").config == config.with_(floor=0.5)
    for text, message in (("{}", "is no profile"), ("[", "cannot be read")):
        (tmp_path / "q.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_profile(tmp_path / "q.json")


@pytest.mark.parametrize(
    "way", [["--sampler", "euler"], ["--scheduler"], ["--scheduler", "EulerDiscreteScheduler"]], ids=" ".join
)
def test_a_folder_of_diffusers(folder: Path, tmp_path: Path, way: list[str]) -> None:
    common = ["generate", "a b", "--model", str(folder), "--size", "128", "--set", "min_tokens=0", "--quiet"]
    assert main([*common, "--steps", "3", "--compare", "--out", str(tmp_path), *way]) == 0
    report = json.loads((tmp_path / "0000-report.json").read_text())
    assert (report["request"]["sampler"], report["request"]["scheduler"]) == (
        ("euler", None) if "--sampler" in way else (None, way[1] if way[1:] else "")
    )
    row = report["pictures"][0]
    assert row["merged_fraction"] >= 0.2
    again = tmp_path / "again"
    assert main(["generate", "--from-png", str(tmp_path / row["merged"]), "--out", str(again), "--quiet"]) == 0
    assert (pixels(again / row["merged"]) == pixels(tmp_path / row["merged"])).all()
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    for name in (row["merged"], "black.png"):
        image = ["--image", str(tmp_path / name), "--strength", "0.7", "--out", str(tmp_path / "image")]
        assert main([*common, "--steps", "3", *image, *way]) == 0
    one, other = (pixels(tmp_path / "image" / f"000{i}-seed0.png") for i in range(2))
    assert one.shape == (128, 128, 3)
    assert (one != other).mean() > 0.5


def without_image_parts(pipe: Any) -> dict[str, Any]:
    return {name: part for name, part in pipe.components.items() if name not in ("feature_extractor", "image_encoder")}


@pytest.fixture(scope="session")
def moving_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of AnimateDiff on Stable Diffusion 1.5's layout."""
    path = tmp_path_factory.mktemp("animatediff")
    pipelines.animate().save_pretrained(path)
    return path


def frames(path: Path) -> list[Any]:
    with Image.open(path) as image:
        count = getattr(image, "n_frames", 1)
        found = []
        for number in range(count):
            image.seek(number)
            found.append(np.asarray(image.convert("RGB")).copy())
        return found


@pytest.mark.parametrize("way", [["--sampler", "euler"], ["--scheduler"]], ids=" ".join)
def test_a_clip_is_an_animated_png_that_another_run_reads_back(
    moving_folder: Path, tmp_path: Path, way: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["generate", "a b", "--model", str(moving_folder), "--size", "128", "--set", "min_tokens=0", *way]
    options = ["--frames", "3", "--steps", "3", "--quiet", "--batch", "2", "--count", "2", "--compare"]
    assert main([*common, *options, "--out", str(tmp_path)]) == 0
    assert "dB" in capsys.readouterr().out
    rows = json.loads((tmp_path / "0000-report.json").read_text())["pictures"]
    assert [row["merged_fraction"] >= 0.2 for row in rows] == [True, True]
    drawn = frames(tmp_path / "0001-seed1.png")
    assert [frame.shape for frame in drawn] == [(128, 128, 3)] * 3
    assert (drawn[0] != drawn[1]).any()
    sheets = frames(tmp_path / "0001-seed1-compare.png")
    assert len(sheets) == 3
    assert sheets[0].shape[1] > 3 * 128
    plain = frames(tmp_path / "0001-seed1-plain.png")
    error = np.square((np.stack(plain).astype(float) - np.stack(drawn)) / 127.5).mean()
    assert rows[1]["psnr"] == pytest.approx(10 * np.log10(4 / error), abs=0.3)  # bytes are rounded
    assert read_png(tmp_path / "0001-seed1.png").frames == 3
    again = tmp_path / "again"  # alone, where it was one of two
    assert main(["generate", "--from-png", str(tmp_path / "0001-seed1.png"), "--out", str(again), "--quiet"]) == 0
    for a, b in zip(frames(again / "0000-seed1.png"), drawn, strict=True):
        assert abs(a.astype(int) - b).max() <= 1


def test_a_clip_is_what_the_pipeline_draws() -> None:
    """Euler's method, from the same noise, by k-diffusion and by the pipeline, both merged."""
    pipe: Any = pipelines.animate()
    model, config = PipelineModel(pipe, "it"), MergeConfig(ratio=0.3, threshold=None, early_ratio=None, min_tokens=0)
    own = pipe.scheduler
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(own.config, timestep_spacing="linspace")
    try:
        pipe.scheduler.set_timesteps(3)
        sigmas = pipe.scheduler.sigmas
        start = Noise([4], (4, 3, 16, 16))()
        from tome_sampler import CFGDenoiser, merging
        from tome_sampler.sampling import sample_euler

        cond, uncond = (model.condition([prompt], (128, 128)) for prompt in ("a b", ""))
        extra = {"cond": cond, "uncond": uncond, "cond_scale": 3.0}
        with torch.no_grad(), merging(pipe.unet, config, sigmas=sigmas.tolist()) as session:
            denoiser = CFGDenoiser(model.denoiser(), session)
            ours = sample_euler(denoiser, start * sigmas[0], sigmas, extra_args=extra, disable=True)
            merged = session.stats.to_dict()
        with merging(pipe, config) as session:
            theirs = pipe(
                "a b", negative_prompt="", num_frames=3, num_inference_steps=3, guidance_scale=3.0,
                latents=start * sigmas[0] / pipe.scheduler.init_noise_sigma, height=128, width=128,
                output_type="latent",
            ).frames  # fmt: skip
            read = session.stats.to_dict()
    finally:
        pipe.scheduler = own
    assert merged["merged_fraction"] == read["merged_fraction"] > 0.25
    assert merged["notes"] == read["notes"] == []
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-3 * float(theirs.abs().max()))


def test_motion_modules_make_a_model_of_pictures_draw_clips(folder: Path, tmp_path: Path) -> None:
    unet = pipelines.motion_unet()
    unet.save_motion_modules(str(tmp_path / "motion"), safe_serialization=True)
    options = ["--model", str(folder), "--motion", str(tmp_path / "motion"), "--size", "64", "--frames", "2"]
    assert main(["generate", "a b", *options, "--out", str(tmp_path / "out"), *QUICK]) == 0
    assert len(frames(tmp_path / "out" / "0000-seed0.png")) == 2
    model: Any = open_model(str(folder), motion=str(tmp_path / "motion"))
    assert model.usual.frames == 16
    assert model.pipe.scheduler.config.beta_schedule == "linear"
    found, expected = model.module.state_dict(), unet.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items() if "motion_modules" in name)


def test_a_clip_starts_from_a_picture(moving_folder: Path, tmp_path: Path) -> None:
    options = ["--model", str(moving_folder), "--size", "64", "--frames", "2", "--strength", "0.7", *QUICK]
    for shade in (0, 250):
        Image.new("RGB", (64, 64), (shade,) * 3).save(tmp_path / "source.png")
        image = ["--image", str(tmp_path / "source.png")]
        assert main(["generate", "a b", *options, *image, "--out", str(tmp_path / "out")]) == 0
    one, other = (np.stack(frames(tmp_path / "out" / f"000{i}-seed0.png")) for i in range(2))
    assert one.shape == (2, 64, 64, 3)
    assert (one != other).mean() > 0.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--frames", "40"], "frames is 40; it must be from 1 to 32"),
        (["--frames", "0"], "frames is 0; it must be from 1 to 32"),
        (["--motion", "nowhere"], "there is no nowhere"),
        (["--motion", "."], "cannot be used"),
        (["--motion", "motion.safetensors"], "motion.safetensors is a file; motion modules are the folder"),
        (["--model-config", "some/model"], "--model-config is 'some/model'; it is for a single file"),
    ],
)
def test_mistakes_about_clips_are_said_in_a_line(
    given: list[str], message: str, folder: Path, moving_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    save_file({"x": torch.zeros(1)}, "motion.safetensors")
    model = folder if "--motion" in given else moving_folder
    assert main(["generate", "a b", "--model", str(model), *given, "--out", "out", *QUICK]) == 2
    *loading, said = capsys.readouterr().err.strip().split("\n")
    assert message in said
    assert all("Loading" in line for line in loading)  # diffusers' progress
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["sd21", "sdxl", "pixart"])
def test_k_diffusion_samples_what_the_pipeline_samples(name: str) -> None:
    """Euler's method, at the same noise levels and from the same noise, is the same in both."""
    pipe: Any = {"sd21": lambda: pipelines.sd("sd21"), "sdxl": pipelines.sdxl, "pixart": pipelines.pixart}[name]()
    model, size, scale = PipelineModel(pipe, name), (128, 128), 3.0
    scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    scheduler.set_timesteps(4)
    noise = torch.randn(1, 4, 16, 16)
    denoiser = model.denoiser()
    cond, uncond = (model.condition([prompt], size) for prompt in ("a b", ""))
    from tome_sampler import CFGDenoiser
    from tome_sampler.sampling import sample_euler

    sigmas, extra = scheduler.sigmas, {"cond": cond, "uncond": uncond, "cond_scale": scale}
    with torch.no_grad():
        ours = sample_euler(CFGDenoiser(denoiser), noise * sigmas[0], sigmas, extra_args=extra, disable=True)
    own, pipe.scheduler = pipe.scheduler, scheduler
    latents = noise * sigmas[0] / scheduler.init_noise_sigma
    options: dict[str, Any] = {"use_resolution_binning": False} if name == "pixart" else {}
    try:
        theirs = pipe(
            "a b", negative_prompt=None if name == "sdxl" else "", num_inference_steps=4, guidance_scale=scale,
            latents=latents, height=128, width=128, output_type="latent", **options,
        ).images  # fmt: skip
    finally:
        pipe.scheduler = own
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_a_model_of_a_pipeline_is_a_model(folder: Path) -> None:
    model = open_model(str(folder))
    assert isinstance(model, Model)
    assert model.usual.size == (128, 128)
    picture = torch.rand(1, 3, 64, 64) * 2 - 1
    assert model.latents(picture).shape == (1, 4, 8, 8)
    with pytest.raises(ValueError, match="multiples of 8"):
        model.latent_shape((100, 128))
    settings = Settings((64, 64), 2, "euler", 2.0)
    alone = [sample(model, ["a"], [seed], settings).pictures for seed in (0, 1)]
    both = sample(model, ["a", "a"], [0, 1], settings).pictures
    torch.testing.assert_close(torch.cat(alone), both, rtol=1e-3, atol=1e-3)


def test_a_vae_that_overflows_in_fp16_runs_in_fp32() -> None:
    parts = {**pipelines.sd().components, "vae": pipelines.vae().half(), "unet": pipelines.unet("sd15").half()}
    model = PipelineModel(type(pipelines.sd())(**parts, requires_safety_checker=False), "it")
    assert model.pictures(torch.randn(1, 4, 8, 8)).dtype == torch.float32
    assert model.pipe.vae.dtype == torch.float32
    assert model.latents(torch.zeros(1, 3, 64, 64)).dtype == torch.float32
    assert model.module.dtype == torch.float16


def test_a_single_file_is_read_with_a_configuration_that_is_at_hand(folder: Path, tmp_path: Path) -> None:
    weights = {name: tensor.clone() for name, tensor in pipelines.original_layout(pipelines.sd()).items()}
    save_file(weights, tmp_path / "model.safetensors")
    torch.save({"state_dict": weights}, tmp_path / "model.ckpt")
    for name in ("model.safetensors", "model.ckpt"):
        model: Any = open_model(str(tmp_path / name), config=str(folder), allow_pickle=name.endswith("ckpt"))
        for part in ("unet", "vae", "text_encoder"):
            expected = getattr(pipelines.sd(), part).state_dict()
            found = getattr(model.pipe, part).state_dict()
            assert set(found) == set(expected)
            assert all(torch.equal(found[key], expected[key]) for key in expected)
    options = ["--model", str(tmp_path / "model.safetensors"), "--model-config", str(folder), "--size", "64"]
    assert main(["generate", "a b", *options, "--dtype", "bf16", "--out", str(tmp_path), *QUICK]) == 0
    assert read_png(tmp_path / "0000-seed0.png").dtype == "bf16"


def wrong_files(path: Path) -> dict[str, str]:
    """Files that are no checkpoint, and what is said of each."""
    held = {
        "lora": ("lora_unet_x", "a LoRA"),
        "sd3": ("model.diffusion_model.joint_blocks.0", "a Stable Diffusion 3 checkpoint"),
        "flux": ("double_blocks.0", "a Flux transformer"),
        "net": ("control_model.x", "a ControlNet"),
        "unet": ("down_blocks.0", "a U-Net alone"),
        "other": ("weight", "nothing that is known"),
    }
    for name, (key, _) in held.items():
        save_file({key: torch.zeros(1)}, path / f"{name}.safetensors")
    (path / "cut.safetensors").write_bytes(b"\xff" * 20)
    torch.save({}, path / "old.ckpt")
    (path / "empty").mkdir()
    return {
        **{f"{name}.safetensors": what for name, (_, what) in held.items()},
        "cut.safetensors": "no safetensors file",
        "old.ckpt": "is pickled.*code.*--allow-pickle",
        "empty": "no model_index.json",
        "missing.safetensors": "there is no",
        "sub/missing/deep": "there is no",
    }


def test_what_is_no_checkpoint_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, message in wrong_files(tmp_path).items():
        assert main(["generate", "a", "--model", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        with pytest.raises(ValueError, match=message):
            open_model(str(tmp_path / name))
    assert not (tmp_path / "out").exists()


def test_what_is_not_here_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **options: Any) -> None:
        raise OSError(f"no network for {name}\nwith a page\nof advice")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", fail)
    expected = "some/model is no file or folder here, and from the hub it cannot be read: no network for some/model"
    with pytest.raises(ValueError, match=f"{expected}$"):
        open_model("some/model")


def test_pipelines_of_other_kinds_are_said_to_be() -> None:
    pipe: Any = pipelines.sd()
    moving: Any = diffusers.AnimateDiffVideoToVideoPipeline(**without_image_parts(pipelines.animate()))
    with pytest.raises(ValueError, match=r"is a AnimateDiffVideoToVideoPipeline; known here are Stable.*AnimateDiffP"):
        PipelineModel(moving, "it")
    distilled = diffusers.LatentConsistencyModelPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(ValueError, match="is a LatentConsistencyModelPipeline; known here are"):
        PipelineModel(distilled, "it")
    unet = pipelines.unet("sdxl", projection_class_embeddings_input_dim=pipelines.TEXT + 5 * 8)
    parts = without_image_parts(pipelines.sdxl())
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(**{**parts, "unet": unet}, requires_aesthetics_score=True)
    with pytest.raises(ValueError, match="is a refiner of SDXL, or of another kind: its U-Net is told of 5 numbers"):
        PipelineModel(refiner, "it")
    inpainting = type(pipelines.sd())(
        **{**pipelines.sd().components, "unet": pipelines.unet("sd15", in_channels=9)}, requires_safety_checker=False
    )
    with pytest.raises(ValueError, match="it is for inpainting or editing"):
        PipelineModel(inpainting, "it")
    with pytest.raises(ValueError, match=r"it is a .*, which draws no pictures of prompts"):
        PipelineModel(diffusers.DDPMPipeline(pipe.unet, pipe.scheduler), "it")


@pytest.mark.parametrize("kind", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_a_pipeline_that_starts_from_a_picture_is_taken_for_that_of_the_same_parts(kind: str) -> None:
    pipe: Any = getattr(diffusers, kind)(**small().pipe.components, requires_safety_checker=False)
    settings = Settings((64, 64), 2, cond_scale=3.0)
    drawn = [sample_in_pipeline(model, ["a"], [0], settings).pictures for model in (PipelineModel(pipe, "it"), small())]
    assert torch.equal(*drawn)


def small(scheduler: Any = None) -> PipelineModel:
    """Stable Diffusion of two blocks, which is sampled in no time."""
    changes: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "layers_per_block": 1,
    }
    parts = {**pipelines.sd().components, "unet": pipelines.unet("sd15", **changes)}
    if scheduler is not None:
        parts["scheduler"] = scheduler.from_config(parts["scheduler"].config)
    pipe = type(pipelines.sd())(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return PipelineModel(pipe, "small")


@pytest.mark.parametrize("strength", [None, 0.55])
@pytest.mark.parametrize("name", ["", "HeunDiscreteScheduler", "PNDMScheduler", "LCMScheduler", "TCDScheduler"])
def test_a_pipelines_loop_calls_as_often_as_is_said(name: str, strength: float | None) -> None:
    model, calls = small(), []
    image = None if strength is None else torch.zeros(1, 3, 64, 64)
    given: dict[str, Any] = {} if strength is None else {"strength": strength}
    sample_in_pipeline(
        model, ["a"], [0], Settings((64, 64), 6), scheduler=name, image=image,
        on_step=lambda step, _: calls.append(step), **given,
    )  # fmt: skip
    assert calls == list(range(calls_of(model, 6, name, strength)))


def test_schedulers_that_cannot_take_the_place_are_said_to_be() -> None:
    for name in ("RePaintScheduler", "FlowMatchEulerDiscreteScheduler", "DDPMWuerstchenScheduler", "Scheduler", "Any"):
        with pytest.raises(ValueError, match=f"scheduler is '{name}'; this model has DDIMScheduler, .*TCDScheduler"):
            calls_of(small(), 3, name)
    assert calls_of(small(diffusers.LCMScheduler), 3, "DDIMScheduler") == 3
    assert calls_of(small(diffusers.EDMDPMSolverMultistepScheduler), 3, "EDMDPMSolverMultistepScheduler") == 3
    with pytest.raises(ValueError, match=r"this model has EDMDPMSolverMultistepScheduler$"):
        calls_of(small(diffusers.EDMDPMSolverMultistepScheduler), 3, "LCMScheduler")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--scheduler", "RePaintScheduler"], "scheduler is 'RePaintScheduler'"),
        (["--scheduler", "--image", "a.png", "--strength", "0.06"], "leaves one of 10 steps"),
        (["--scheduler", "--steps", "2000"], "2000"),
    ],
)
def test_a_loop_that_cannot_run_is_told_of_before_anything_is_drawn(
    given: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    assert main(["generate", "a b", "--model", str(folder), "--steps", "10", "--out", "out", "--quiet", *given]) == 2
    assert message in capsys.readouterr().err.strip().split("\n")[-1]
    assert not (tmp_path / "out").exists()


def test_a_pipeline_without_a_loop_from_pictures_is_said_to_be(moving_folder: Path) -> None:
    with pytest.raises(ValueError, match="diffusers has no AnimateDiffPipeline that starts from a picture"):
        calls_of(open_model(str(moving_folder)), 5, strength=0.5)  # type: ignore[arg-type]


def test_sdxl_is_drawn_as_its_pipeline_draws_it() -> None:
    """Without a negative prompt that is against zeros, in the pipeline's loop and in k-diffusion's."""
    model, settings = PipelineModel(pipelines.sdxl(), "it"), Settings((64, 64), 4, "euler", 5.0)
    theirs = model.pipe(
        "a b", num_inference_steps=4, guidance_scale=5.0, generator=torch.Generator().manual_seed(3), height=64,
        width=64, output_type="pt",
    ).images  # fmt: skip
    for function in (sample_in_pipeline, sample):
        pictures = function(model, ["a b"], [3], settings).pictures  # type: ignore[operator]
        torch.testing.assert_close(pictures / 2 + 0.5, theirs, rtol=0, atol=2e-3)
    against = sample_in_pipeline(model, ["a b"], [3], settings, negative="c").pictures
    assert (against / 2 + 0.5 - theirs).abs().mean() > 1e-3


def test_a_vae_whose_channels_are_scaled_each_by_its_own() -> None:
    vae = pipelines.vae()
    vae.register_to_config(latents_mean=[-1.6, 1.2, 0.3, -0.5], latents_std=[8.4, 6.0, 5.3, 5.5], scaling_factor=0.5)
    pipe: Any = diffusers.StableDiffusionXLPipeline(**{**without_image_parts(pipelines.sdxl()), "vae": vae})
    pipe.set_progress_bar_config(disable=True)
    model = PipelineModel(pipe, "it")
    latents, picture = (
        pipe("a", num_inference_steps=1, height=64, width=64, output_type=kind,
             generator=torch.Generator().manual_seed(0)).images for kind in ("latent", "pt")
    )  # fmt: skip
    torch.testing.assert_close(model.pictures(latents) / 2 + 0.5, picture, rtol=0, atol=1e-5)
    start = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    start.scheduler.set_timesteps(1)
    encoded = start.prepare_latents(picture * 2 - 1, None, 1, 1, torch.float32, "cpu", add_noise=False)
    spread = vae.encode(picture * 2 - 1).latent_dist.std * 0.5 / torch.tensor([8.4, 6.0, 5.3, 5.5]).view(1, 4, 1, 1)
    assert ((model.latents(picture * 2 - 1) - encoded).abs() <= 6 * spread + 1e-5).all()  # that one draws a sample


def test_a_folder_with_pickled_weights_needs_the_flag(folder: Path, tmp_path: Path) -> None:
    pipelines.sd().save_pretrained(tmp_path / "pickled", safe_serialization=False)
    for part in (tmp_path / "pickled").rglob("*.safetensors"):  # transformers writes nothing else any more
        torch.save({}, part.with_suffix(".bin"))
        part.unlink()
    with pytest.raises(ValueError, match=r"is pickled.*--allow-pickle"):
        open_model(str(tmp_path / "pickled"))


def cloned(folder: Path, path: Path) -> Path:
    """A folder as a clone of a repository on the hub is: with all that nobody loads beside what is loaded."""
    shutil.copytree(folder, path, copy_function=os.link)
    (path / "logs").mkdir()
    (path / "checkpoint-500").mkdir()
    for name in ("v1-5-pruned.ckpt", "logs/optimizer.bin", "checkpoint-500/diffusion_pytorch_model.bin"):
        torch.save({}, path / name)
    weights = path / "unet" / "diffusion_pytorch_model.safetensors"
    twins = ("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors")
    for name in ("v1-5-pruned.safetensors", *twins):
        os.link(weights, path / name)
    torch.save({}, path / "unet" / "diffusion_pytorch_model.bin")
    return path


def test_a_clone_is_read_without_what_nobody_loads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cloned(folder, tmp_path / "clone")
    parts = [part for part in pipelines.sd().components.values() if isinstance(part, torch.nn.Module)]
    need = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    monkeypatch.setattr("tome_sampler.bench.memory.free_memory", lambda device: int(need * 1.12))
    open_model(str(path))
    monkeypatch.setattr("tome_sampler.bench.memory.free_memory", lambda device: int(need * 0.56))
    open_model(str(path), dtype="bf16")
    with pytest.raises(ValueError, match=r"^reading clone: .* GB are free on cpu; --dtype bf16 takes half$"):
        open_model(str(path))
    (path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"^unet/diffusion_pytorch_model.bin is pickled"):
        open_model(str(path))
    (path / "model_index.json").unlink()  # which the folder has, too
    (path / "model_index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"model_index.json is damaged"):
        open_model(str(path))


def test_half_precision_that_is_read_as_fp32_takes_twice_its_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16).save_pretrained(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    monkeypatch.setattr("tome_sampler.bench.memory.free_memory", lambda device: int(size * 1.5))
    open_model(str(tmp_path), dtype="fp16")
    with pytest.raises(ValueError, match="--dtype bf16 takes half"):
        open_model(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no prompt"),
        (["a red unicorn in the middle"], "unicorn"),
        ([PROMPT, "--size", "100"], "multiples of 32"),
        ([PROMPT, "--size", "large"], "height x width"),
        ([PROMPT, "--steps", "1"], "at least 2"),
        ([PROMPT, "--sampler", "magic"], "k-diffusion has"),
        ([PROMPT, "--scheduler"], "sampled by k-diffusion alone"),
        ([PROMPT, "--preset", "best"], "must be one of"),
        ([PROMPT, "--set", "ratio"], "FIELD=VALUE"),
        ([PROMPT, "--set", "ratio=2"], "ratio is 2"),
        ([PROMPT, "--plain", "--compare"], "--plain merges nothing"),
        ([PROMPT, "--preset", "fast", "--profile", "x.json"], "both given"),
        ([PROMPT, "--profile", "missing.json"], "no profile missing.json"),
        ([PROMPT, "--image", "missing.png"], "there is no missing.png"),
        (["--from-png", "missing.png"], "there is no missing.png"),
        ([PROMPT, "--count", "0"], "at least 1"),
        ([PROMPT, "--seed", str(2**64)], f"seed is {2**64}; it must be from 0 to {2**63 - 1}"),
        ([PROMPT, "--seed", str(2**63 - 1), "--count", "2"], f"it must be from 0 to {2**63 - 2}"),
        ([PROMPT, "--seed", "-1"], "seed is -1; it must be from 0 to"),
        ([PROMPT, "--cond-scale", "nan"], "cond_scale is nan; it must be a finite number"),
        ([PROMPT, "--image", "a.png", "--strength", "1.5"], "strength is 1.5; it must be from 0 to 1"),
        ([PROMPT, "--strength", "0.5"], "it goes with --image"),
        ([PROMPT, "--sampler", "euler", "--scheduler"], "--sampler and --scheduler are both given"),
        ([PROMPT, "--batch", "0"], "at least 1"),
        ([PROMPT, "--dtype", "fp16"], "runs in 'fp32'"),
        ([PROMPT, "--frames", "4"], "frames is 4; embedded draws single pictures"),
        ([PROMPT, "--motion", "x/y"], "draws single pictures"),
        ([PROMPT, "--model-config", "x/y"], "--model-config is 'x/y'; it is for a single file"),
        ([PROMPT, "--device", "abacus"], "device is 'abacus'"),
    ],
)
def test_mistakes_are_said_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *arguments, "--out", str(tmp_path / "out"), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_memory_that_runs_out_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr("tome_sampler.generate.run.sample", fail)
    assert main(["generate", PROMPT, "--out", str(tmp_path), *QUICK]) == 2
    assert "too little memory" in capsys.readouterr().err
    monkeypatch.setattr("tome_sampler.bench.memory.free_memory", lambda device: 10)
    path = tmp_path / "model.safetensors"
    save_file({"cond_stage_model.x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"reading model.safetensors: .* are free"):
        open_model(str(path))


def test_a_request_survives_a_picture(tmp_path: Path) -> None:
    request = Request(("a", "ü"), size=(64, 96), scheduler="", merging=MergeConfig.preset("fast").to_dict())
    write_png([Image.new("RGB", (4, 4))], tmp_path / "a.png", request)
    assert read_png(tmp_path / "a.png") == request
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="carries no settings"):
        read_png(tmp_path / "b.png")
    with pytest.raises(ValueError, match="unknown here"):
        Request.from_data({"prompts": ["a"], "colour": 1})
