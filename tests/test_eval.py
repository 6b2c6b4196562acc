"""`tome-sampler eval`: what it measures, that it goes on where it stopped, and what it says of bad input."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import animate, pixart, sd

from tome_sampler.cli import main
from tome_sampler.demo import load_model
from tome_sampler.demo.scenes import draw, random_scene, scene_from_caption
from tome_sampler.eval import metrics, rows
from tome_sampler.eval.evaluate import _said
from tome_sampler.eval.features import features_of, load_features, right_answers, train
from tome_sampler.eval.flops import flops_of
from tome_sampler.eval.frechet import scene_distance
from tome_sampler.eval.measure import Plan, part_of, parts_of
from tome_sampler.eval.methods import applicable, read_methods
from tome_sampler.eval.pictures import read_pictures
from tome_sampler.eval.processes import Processes
from tome_sampler.eval.prompts import NEXT_SEED, cases, held_out_captions, read_prompts, scene_of
from tome_sampler.eval.report import curves, differences, matched_table, matches, table
from tome_sampler.eval.summary import Estimate, estimate, match, points
from tome_sampler.eval.weights import clip_score, inception_distances, lpips
from tome_sampler.models import open_model
from tome_sampler.models.run import Settings, sample

CAPTION = "a large red ring in the middle on wavy navy"
OTHER = "a small white cross at the top left, a large green circle at the bottom on plain grey"
METHODS = "plain,tomesd:ratio=0.5,ca-tome:r=0.5,default:ratio=0.5,threshold=None,min_tokens=0,plain:more_steps=1"
NEEDED = {
    *("method", "setting", "prompt", "seed", "psnr", "ssim", "error_inside", "error_outside"),
    *("unet_seconds", "merged_fraction", "ms_ssim", "gmsd", "flops"),
}
FEW = "plain,tomesd:ratio=0.5"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
TIMES = ("unet_seconds", "plain_seconds")


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(f"# two\n{CAPTION}\n\n{OTHER}\n")
    return path


def arguments(prompt_file: Path, json_file: Path | None, *more: str, methods: str = METHODS) -> list[str]:
    size = ["--size", "32", "--steps", "2", "--quiet", "--methods", methods]
    file = [] if json_file is None else ["--json", str(json_file)]
    return ["eval", "--prompt-file", str(prompt_file), *size, *file, *more]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what no two runs have in common."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in found]


def few(written: Path) -> list[dict[str, Any]]:
    """What the fixture's run has of :data:`FEW`."""
    found = numbers(rows_of(written / "rows.jsonl"))
    return [row for row in found if row["method"] == "tomesd" or row["method"] + row["setting"] == "plain"]


@pytest.fixture(scope="module")
def written(prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run through the command line, with everything that it writes."""
    folder = tmp_path_factory.mktemp("eval")
    outputs = ["--markdown", str(folder / "t.md"), "--plot", str(folder / "p.png"), "--sheet", str(folder / "s.png")]
    more = ["--seeds", "2", "--pictures", str(folder / "pictures"), *outputs]
    assert main(arguments(prompt_file, folder / "rows.jsonl", *more)) == 0
    return folder


# -- a whole run


def test_a_row_for_each_method_prompt_and_seed(written: Path) -> None:
    found = rows_of(written / "rows.jsonl")
    assert len(found) == 5 * 2 * 2
    assert len({rows.key_of(row) for row in found}) == len(found)
    for row in found:
        assert row.keys() >= NEEDED
        assert row["unet_seconds"] > 0
        assert row["flops"] > 0
        if row["method"] == "plain" and not row["setting"]:
            assert (row["psnr"], row["ssim"], row["error_inside"]) == (99, 1, 0)
            assert row["merged_fraction"] is None
        else:
            assert row["psnr"] < 99
            assert 0 < row["error_inside"] < 1
            assert 0 < row["error_outside"] < 1
    plain, half = (next(r for r in found if r["method"] == name) for name in ("plain", "tomesd"))
    assert half["merged_fraction"] == 0.5
    assert half["flops"] < plain["flops"]
    # of two steps, one is early
    assert next(r for r in found if r["method"] == "default")["merged_fraction"] == (0.75 + 0.5) / 2
    assert [row["seed"] for row in found if row["setting"] == "ratio=0.5"] == [0, NEXT_SEED, 1, 1 + NEXT_SEED]


def test_table_plot_sheet_and_pictures_are_written(written: Path) -> None:
    text = (written / "t.md").read_text()
    for label in ("tomesd:ratio=0.5", "ca-tome:r=0.5", "default:ratio=0.5,threshold=None,min_tokens=0"):
        assert f"| {label} |" in text
    assert "4 pictures of 2 prompts" in text
    assert "At the same speed: ours:min_tokens=0" in text
    for name in ("p.png", "s.png"):
        with Image.open(written / name) as image:
            assert image.width > 400
    assert len(list((written / "pictures").rglob("*.png"))) == 20
    assert len(read_pictures(written / "pictures" / "plain")) == 4


def test_a_finished_run_draws_nothing_again(written: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (written / "rows.jsonl").read_bytes()
    monkeypatch.setattr("tome_sampler.eval.measure.Plan.draw", None)
    assert main(arguments(prompt_file, written / "rows.jsonl", "--seeds", "2")) == 0
    assert (written / "rows.jsonl").read_bytes() == before


def test_a_cache_of_deep_layers_alone_and_below_a_preset() -> None:
    """Every third step is whole, and merging is at work in all of them; then nothing of either is left."""
    pytest.importorskip("DeepCache")
    model = open_model(None, device="cpu")
    unet, whole = model.module.unet, []
    settings = Settings((64, 64), steps=5, cond_scale=3.0)
    label = "default+deepcache:ratio=0.5,threshold=None,early_ratio=None,min_tokens=0"
    (_, alone, both), _ = read_methods(f"deepcache,{label}")
    (_, merged), _ = read_methods(label.replace("+deepcache", ""))
    assert (alone.config, both.config) == (None, merged.config)
    plain = sample(model, [CAPTION], [1], settings)
    before = [dict(vars(module)) for module in unet.modules()]
    hook = unet.mid_block.resnets[0].register_forward_hook(lambda *_: whole.append(1))
    try:
        drawn = [method.draw(model, [CAPTION], [1], settings, time.process_time) for method in (alone, both, merged)]
    finally:
        hook.remove()
    assert len(whole) == 2 + 2 + 5
    assert [d.merged_fraction for d in drawn] == [None, 0.5, 0.5]
    pictures = [plain.pictures, *(d.pictures for d in drawn)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(pictures, 2))
    assert [dict(vars(module)) for module in unet.modules()] == before
    assert torch.equal(sample(model, [CAPTION], [1], settings).pictures, plain.pictures)


# -- stopped and started again


def test_a_killed_run_goes_on_where_it_stopped(written: Path, prompt_file: Path, tmp_path: Path) -> None:
    kept = 12
    whole = (written / "rows.jsonl").read_text().splitlines(keepends=True)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(whole[:kept]) + whole[kept][:100])  # the last line was torn
    assert main(arguments(prompt_file, file, "--seeds", "2")) == 0
    assert numbers(rows_of(file)) == numbers(rows_of(written / "rows.jsonl"))
    assert file.read_text().splitlines(keepends=True)[:kept] == whole[:kept], "what was there is not drawn again"


def test_a_process_that_is_killed_loses_nothing(prompt_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    given = arguments(prompt_file, file, "--seeds", "40", methods=FEW)
    with subprocess.Popen([sys.executable, "-m", "tome_sampler", *given], env=ONE_THREAD) as process:
        while process.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") >= 3):
            time.sleep(0.02)
        process.kill()
    before = rows.read_rows(file)
    assert 3 <= len(before) < 2 * 2 * 40
    assert main(arguments(prompt_file, file, "--seeds", "2", methods=FEW)) == 0
    after = rows_of(file)
    assert len(after) == len({rows.key_of(row) for row in after}) >= 2 * 2 * 2
    assert all(row in after for row in before)


def test_methods_and_seeds_can_be_added(written: Path, prompt_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert main(arguments(prompt_file, file, methods="plain")) == 0
    first = rows_of(file)
    assert main(arguments(prompt_file, file, "--seeds", "2", methods=FEW)) == 0
    assert numbers(rows_of(file)) == few(written)
    assert all(row in rows_of(file) for row in first)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--cond-scale", "5"], "cond_scale 3.0, and now it is 5.0"),
        (["--first-seed", "9"], "first_seed 0, and now it is 9"),
        (["--batch", "2"], "batch 1, and now it is 2"),
    ],
)
def test_other_settings_are_not_mixed_into_a_file(
    written: Path, prompt_file: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (written / "rows.jsonl").read_bytes()
    assert main(arguments(prompt_file, written / "rows.jsonl", *more)) == 2
    assert said in capsys.readouterr().err
    assert (written / "rows.jsonl").read_bytes() == before


def test_a_preset_that_changed_is_noticed(
    written: Path, prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, found = tmp_path / "rows.jsonl", rows_of(written / "rows.jsonl")
    for row in found:
        if row["method"] == "default":
            row["config"]["pool"] = 3.0
    rows.write_rows(file, found)
    assert main(arguments(prompt_file, file, "--seeds", "2")) == 2
    assert "pictures of default when that preset meant other settings" in capsys.readouterr().err


# -- a user's own model


def test_a_checkpoint_and_free_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, prompts, file = tmp_path / "model", tmp_path / "prompts.txt", tmp_path / "rows.jsonl"
    sd().save_pretrained(model)
    prompts.write_text("a cat\n")
    given = arguments(prompts, file, "--model", str(model), methods="tomesd:ratio=0.5,default:min_tokens=0")
    assert main([*given, "--negative", "a dog", "--size", "64"]) == 0
    plain, tomesd, default = rows_of(file)
    assert tomesd["merged_fraction"] == 0.5
    assert 0.2 <= default["merged_fraction"] <= 0.5
    assert tomesd["flops"] < plain["flops"]
    assert default["error_inside"] is None, "where objects lie is known of drawn scenes only"
    assert "features" not in default
    assert "scene FD" not in capsys.readouterr().out
    assert main(["eval", "--model", str(model), "--quiet"]) == 2
    assert "needs --prompt-file" in capsys.readouterr().err
    animate().save_pretrained(tmp_path / "clips")
    assert main(arguments(prompts, file, "--model", str(tmp_path / "clips"), methods="default")) == 2
    assert "draws clips, and eval compares pictures" in capsys.readouterr().err
    (model / "unet" / "config.json").write_text("{}")
    assert main([*given, "--negative", "a dog", "--size", "64"]) == 2
    assert "mismatched_sizes" in capsys.readouterr().err, "its weights are not of the model that it says"


def test_packages_are_not_put_on_models_of_other_kinds() -> None:
    model: Any = SimpleNamespace(module=pixart().transformer)
    methods, _ = read_methods("tomesd:ratio=0.5,default")
    with pytest.raises(
        ValueError, match=r"tomesd:ratio=0.5: made for UNet2DConditionModel, .* PixArtTransformer2DModel"
    ):
        applicable(methods, model, asked=True)
    kept, notes = applicable(methods, model, asked=False)
    assert [method.label for method in kept] == ["plain", "default"]
    assert "tomesd:ratio=0.5" in notes[0]
    assert applicable(methods, SimpleNamespace(module=load_model()), asked=True) == (methods, [])  # type: ignore[arg-type]


def test_the_cache_is_not_put_on_a_model_without_a_middle_block(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("DeepCache")
    model: Any = SimpleNamespace(module=load_model())
    monkeypatch.setitem(model.module.unet._modules, "mid_block", None)
    methods, _ = read_methods("tomesd:ratio=0.5,default+deepcache")
    with pytest.raises(
        ValueError, match=r"default\+deepcache: made for U-Nets with a middle block, .* has none; leave"
    ):
        applicable(methods, model, asked=True)
    kept, _ = applicable(methods, model, asked=False)
    assert [method.label for method in kept] == ["plain", "tomesd:ratio=0.5"]


# -- several processes


def test_two_processes_give_the_numbers_of_one(written: Path, prompt_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    file = tmp_path / "rows.jsonl"
    whole = (written / "rows.jsonl").read_text().splitlines(keepends=True)
    part_of(file, 1).write_text("".join(whole[10:12]))  # of a launch of more processes that was stopped
    part_of(file, 3).write_text(whole[12] + whole[13][:80])
    # with --cpu it would launch a single process; --multi_gpu launches two, which are on the CPU where there is no GPU
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    more = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "tome_sampler"]
    run = subprocess.run(
        [sys.executable, *launch, *more, *arguments(prompt_file, file, "--seeds", "2"), "--device", "cpu"],
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    assert numbers(rows_of(file)) == numbers(rows_of(written / "rows.jsonl"))
    assert [line for line in file.read_text().splitlines(keepends=True) if line in whole] == whole[10:13]
    assert "Drawn by 2 processes." in run.stdout
    assert list(tmp_path.iterdir()) == [file], "the processes' files became one"
    assert run.stdout.count("| tomesd:ratio=0.5 |") == 3, "one process reports: a line in each table"


@pytest.mark.parametrize("number", [0, 1])
def test_a_second_seed_that_is_added_is_shared_out(
    number: int,
    prompt_file: Path,
    written: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Pictures lie prompt by prompt, so every other one of them all would be the second seeds: one process's alone."""
    file, drawn = tmp_path / "rows.jsonl", []
    first = [line for line in (written / "rows.jsonl").read_text().splitlines() if json.loads(line)["seed"] < NEXT_SEED]
    file.write_text("\n".join(first) + "\n")
    of_first: list[list[Any]] = [rows.read_rows(file), [1, 3]]  # rows, and the groups that are missing

    class OneOfTwo(Processes):
        def __init__(self, device: str | None) -> None:
            super().__init__(device)
            self.number, self.count = number, 2

        def gather(self, items: list[Any]) -> list[Any]:
            return items if self.first or not of_first else of_first.pop(0)

    def draw(plan: Plan, groups: list[list[Any]], *args: Any) -> list[Any]:
        drawn.extend(case for group in groups for case in group)
        return []

    monkeypatch.setattr("tome_sampler.eval.evaluate.Processes", OneOfTwo)
    monkeypatch.setattr("tome_sampler.eval.measure._drawn", draw)
    assert main(arguments(prompt_file, file, "--seeds", "2")) == 2
    assert [(case.prompt, case.seed) for case in drawn] == [([CAPTION, OTHER][number], NEXT_SEED + number)]
    assert "10 of 20 pictures have been compared" in capsys.readouterr().err, "nothing partial is passed off as whole"


# -- bad input, and disks that are full


def test_an_empty_prompt_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("\n# nothing\n")
    assert main(arguments(tmp_path / "prompts.txt", None)) == 2
    assert "has no prompts" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file"):
        read_prompts(tmp_path / "prompts.txt")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--methods", "tome"], "method is 'tome'; it must be one of plain, tomesd, ca-tome"),
        (["--methods", "tomesd+deepcache"], "method is 'tomesd+deepcache'; it must be one of plain"),
        (["--methods", "default+tomesd"], "method is 'default+tomesd'; it must be one of plain"),
        (["--methods", "deepcache:interval=2"], "deepcache has no field 'interval'; it has none"),
        (["--methods", "tomesd:rate=0.5"], "tomesd has no field 'rate'; it has ratio"),
        (["--methods", "default:ratio=2"], "ratio is 2"),
        (["--methods", "plain:more_steps=0"], "more_steps is 0"),
        (["--methods", "fast,fast"], "must name each one once"),
        (["--methods", "default,default:"], "must name each one once"),
        (["--methods", "tomesd:ratio=0.9"], "ratio of tomesd is 0.9; it must be a number from 0 to 0.75"),
        (["--methods", "tomesd:ratio=abc"], "ratio of tomesd is 'abc'"),
        (["--methods", "ca-tome:r=x"], "r of ca-tome is 'x'; it must be a number from -1 to 1"),
        (["--size", "33"], "size is 33x33"),
        (["--size", "big"], "size is 'big'"),
        (["--seeds", "0"], "seeds is 0; it must be at least 1"),
        (["--steps", "1"], "steps is 1"),
        (["--sampler", "best"], "sampler is 'best'"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--markdown", "/no/such/folder/t.md"], "there is no folder /no/such/folder"),
        (["--inception", "x.pth"], "--inception needs --pictures"),
        (["--reference", "x"], "--reference needs --inception"),
        (["--lpips", "/no/weights"], "--lpips is /no/weights, which does not exist"),
        (["--clip", "/no/weights"], "--clip is /no/weights, which does not exist"),
        (["--against", "slow"], "against is 'slow'; it must be one of the methods, tomesd:ratio=0.5"),
        (["--matched", "slow"], "matched is 'slow'; it must be one of"),
    ],
)
def test_what_cannot_be_is_said(
    prompt_file: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tome_sampler.eval.evaluate.measure", lambda *args, **kwargs: [])
    assert main([*arguments(prompt_file, None), *more]) == 2
    assert said in capsys.readouterr().err


def test_a_prompt_that_the_model_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a portrait of a cat\n")
    assert main(arguments(tmp_path / "prompts.txt", None)) == 2
    assert "does not know" in capsys.readouterr().err


def test_pictures_that_cannot_be_read_or_compared(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder"):
        read_pictures(tmp_path / "none")
    with pytest.raises(ValueError, match="has no pictures"):
        read_pictures(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 9)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png is 8x9 and a\.png is 8x8; all must have one size"):
        read_pictures(tmp_path)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"b\.png is not a readable picture"):
        read_pictures(tmp_path)


def test_a_file_that_is_something_else(prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, said in [
        ("no json\n{}\n", "line 1, is not JSON"),
        ('{"a": 1}\n', "line 1, is no row"),
        ('{"a": 1}', "line 1, is no row"),
    ]:
        (tmp_path / "rows.jsonl").write_text(content)
        assert main(arguments(prompt_file, tmp_path / "rows.jsonl")) == 2
        assert said in capsys.readouterr().err
        assert (tmp_path / "rows.jsonl").read_text() == content
    assert main(arguments(prompt_file, tmp_path)) == 2
    assert "no regular file" in capsys.readouterr().err


def full_disk(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_said_and_leaves_whole_rows(
    written: Path,
    prompt_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write, written_bytes = os.write, []

    def nearly_full(file: int, data: bytes) -> int:
        if len(written_bytes) >= 3:
            full_disk()
        written_bytes.append(1)
        return write(file, data if len(written_bytes) < 3 else data[:50])  # the third row is torn

    file = tmp_path / "rows.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", nearly_full)
        more = ["--seeds", "2", "--markdown", str(tmp_path / "t.md")]
        assert main(arguments(prompt_file, file, *more, methods=FEW)) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert len(rows_of(file)) == 2
    assert not (tmp_path / "t.md").exists()
    assert main(arguments(prompt_file, file, "--seeds", "2", methods=FEW)) == 0
    assert numbers(rows_of(file)) == few(written)


def test_a_report_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.md"
    rows.write_whole(path, b"before")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"t\.md cannot be written \(No space left on device\)"):
        rows.write_whole(path, b"after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


# -- weights that the user gives


def test_clip_scores_come_from_a_local_folder(tmp_path: Path, prompt_file: Path) -> None:
    transformers = pytest.importorskip("transformers")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = {**small, **ends, "vocab_size": len(words), "max_position_embeddings": 128}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**small, "image_size": 32, "patch_size": 16}, projection_dim=8
    )
    folder = tmp_path / "clip"
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    side = {"height": 32, "width": 32}
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side).save_pretrained(folder)
    file, more = tmp_path / "rows.jsonl", ["--clip", str(folder), "--markdown", str(tmp_path / "t.md")]
    assert main(arguments(prompt_file, file, *more, methods=FEW)) == 0
    assert all(0 <= row["clip"] <= 100 for row in rows_of(file))
    assert "| CLIP |" in (tmp_path / "t.md").read_text()
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no CLIP model with its processor"):
        clip_score(folder)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="they can be had here")
def test_what_a_measure_needs_is_said(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ImportError, match="--lpips needs torchvision"):
        lpips(tmp_path / "w.pth")
    with pytest.raises(ImportError, match="--inception needs torch-fidelity"):
        inception_distances(tmp_path / "w.pth")
    (tmp_path / "w.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"w\.pth, which does not hold weights"):
        lpips(tmp_path / "w.pth")


# -- what is measured


def test_metrics_of_equal_and_of_different_pictures() -> None:
    scene = scene_from_caption(CAPTION)
    picture = draw([scene], 128, random.Random(0))[0]
    inside = metrics.named_objects(scene, (128, 128))
    same = metrics.compare(picture, picture, inside)
    assert (same.psnr, same.ssim, same.gmsd, same.error_inside, same.error_outside) == (99, 1, 0, 0, 0)
    assert same.ms_ssim == pytest.approx(1)
    noisy = metrics.compare(picture + 0.2 * torch.randn_like(picture) * inside, picture, inside)
    assert noisy.error_inside is not None
    assert noisy.error_inside > 0.03
    assert noisy.error_outside == 0
    blurred = metrics.compare(torch.nn.functional.avg_pool2d(picture[None], 5, 1, 2)[0], picture, None)
    assert blurred.gmsd > 0.03
    assert blurred.error_inside is None
    assert (blurred.ms_ssim or 1) < 1


def test_what_a_caption_names_lies_inside() -> None:
    rng = random.Random(1)
    for _ in range(20):
        scene = random_scene(rng)
        inside = metrics.named_objects(scene, (128, 128))
        state = rng.getstate()
        whole = draw([scene], 128, rng)[0]
        rng.setstate(state)
        other = draw([replace(scene, things=())], 128, rng)
        differs = (whole - other[0]).abs().amax(0) > 1e-3
        assert not (differs & ~inside).any()
        assert inside.float().mean() < 0.5


def test_flops_of_products_and_attention() -> None:
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert flops_of(lambda: a @ b) == 2 * 3 * 4 * 5
    q = torch.randn(1, 2, 8, 16)
    attention = torch.nn.functional.scaled_dot_product_attention
    mask = torch.zeros(8, 8)
    assert flops_of(lambda: attention(q, q, q)) == 2 * (2 * 2 * 8 * 8 * 16)
    assert flops_of(lambda: attention(q, q, q, attn_mask=mask)) == 2 * (2 * 2 * 8 * 8 * 16)


def test_methods_as_they_are_named() -> None:
    methods, notes = read_methods("fast,default:ratio=0.7,threshold=None,tomesd:ratio=0.3,plain:other_seed=2")
    assert [m.label for m in methods][:3] == ["plain", "fast", "default:ratio=0.7,threshold=None"]
    assert methods[2].config.ratio == 0.7  # type: ignore[union-attr]
    assert [m.curve for m in methods] == ["plain", "ours", "ours", "tomesd", "plain:other_seed=2"]
    assert not notes


def test_packages_leave_no_trace(written: Path) -> None:
    del written  # whose methods have run on the model
    assert not [m for m in load_model().modules() if hasattr(m, "_tome_info") or hasattr(m, "_cache_info")]
    assert not [m for m in load_model().modules() if m._forward_pre_hooks or m._forward_hooks]


def test_captions_are_held_out_and_known_by_their_seed() -> None:
    captions = held_out_captions(5, 40)
    assert held_out_captions(3, 42)[:3] == captions[2:]
    assert all(scene_of(caption) is not None for caption in captions)
    assert scene_of("a cat") is None
    first, second = cases(captions, 2, 40), cases(captions[:2], 3, 40)
    assert first[:2] == second[:2]
    assert len({case.seed for case in first}) == 10


def test_a_caption_that_training_has_seen_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = held_out_captions(2, 40)
    monkeypatch.setattr("tome_sampler.eval.prompts.trained_captions", lambda: {one})
    after = held_out_captions(2, 40)
    assert one not in after
    assert after[1] == two


@pytest.mark.parametrize(
    ("side", "there"), [(96, False), (98, False), (99, True), (161, True), (175, True), (176, True)]
)
def test_ms_ssim_of_every_size(side: int, there: bool) -> None:
    picture = torch.rand(1, 3, side, side + 8)
    value = metrics.ms_ssim(picture, picture)
    assert value == pytest.approx(1.0) if there else value is None


def test_files_of_other_processes_are_known_by_their_whole_name(tmp_path: Path) -> None:
    file = tmp_path / "rows[1].jsonl"
    for number in (0, 12):
        part_of(file, number).touch()
    (tmp_path / f"{part_of(file, 0).name}.bak").touch()
    assert parts_of(file) == [part_of(file, 0), part_of(file, 12)]


def test_what_sessions_noted_is_said_of_their_methods() -> None:
    row = {"setting": "", "notes": ["layers of 256 tokens are left alone"]}
    found = _said(
        [{"method": "fast", **row}, {"method": "fast", **row}, {"method": "default", **row}, {"method": "plain"}]
    )
    assert found == ["fast, default: layers of 256 tokens are left alone."]


def test_the_shipped_features_tell_scenes_apart() -> None:
    share = right_answers(load_features(), 60, seed=1)
    assert share["occurs"] > 0.85
    assert share["texture"] > 0.95
    assert share["background"] > 0.95
    rng = random.Random(5)
    scenes = [random_scene(rng) for _ in range(40)]
    one, two = (features_of(draw(scenes, 128, rng)).double().numpy() for _ in range(2))
    flat = features_of(draw([replace(s, things=s.things[:1], texture="plain") for s in scenes], 128, rng))
    near, far = scene_distance(one, two), scene_distance(one, flat.double().numpy())
    assert near < 0.3 * far
    assert scene_distance(one) > 0


def test_the_trainer_is_seeded() -> None:
    first, second = (train(2, 3, progress=False).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# -- figures over the set


def test_intervals_cover_the_mean_and_come_from_a_seed() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(40):
        values = rng.normal(1.0, 2.0, 30)
        found = estimate(values)
        assert found.low is not None
        assert found.high is not None
        assert found.low < found.value < found.high
        inside += found.low < 1.0 < found.high
    assert inside >= 33
    assert estimate(values) == found
    assert estimate(values[:3]).low is None
    assert estimate(np.full(5, 2.0)) == Estimate(2.0)
    assert estimate(values + 50).above is True
    assert estimate(values - 50).above is False


def fake_rows(label: str, seconds: float, psnr: float, prompts: int = 12) -> list[dict[str, Any]]:
    name, _, setting = label.partition(":")
    rng = random.Random(label)
    common = {"ssim": 0.9, "ms_ssim": 0.9, "gmsd": 0.1, "error_outside": 0.1, "flops": 1e9, "merged_fraction": 0.5}
    return [
        {
            **common,
            "method": name,
            "setting": setting,
            "prompt": f"p{i}",
            "seed": seed,
            "psnr": psnr + i + rng.random(),
            "unet_seconds": seconds,
            "plain_seconds": 2.0,
            "error_inside": 1 / psnr,
        }
        for i in range(prompts)
        for seed in (0, 1)
    ]


def test_curves_are_compared_at_the_same_speed() -> None:
    values = {
        "plain": (2.0, 99.0),
        "tomesd:ratio=0.5": (1.0, 40.0),
        "tomesd:ratio=0.2": (1.8, 45.0),
        "tomesd:ratio=0.7": (0.5, 30.0),
        "default:ratio=0.3,threshold=None,importance=0": (2 / 1.5, 60.0),
        "default:ratio=0.6,importance=0,early_ratio=0.9": (2 / 2.5, 50.0),
        "fast": (0.8, 44.0),
    }
    methods, _ = read_methods(",".join(values))
    found = points(methods, [row for m in methods for row in fake_rows(m.label, *values[m.label])])
    assert [round(p.speedup, 2) for p in found] == [1.0, 2.0, 1.11, 4.0, 1.5, 2.5, 2.5]
    assert set(curves(found)) == {"tomesd", "ours:importance=0", "ours"}
    name, pairs = matches(found, None)
    assert name == "ours:importance=0"
    by_label = {theirs.method.label: pair for theirs, pair in pairs}
    half = by_label["tomesd:ratio=0.5"]
    assert half is not None
    assert half.psnr.value == pytest.approx(15, abs=0.5)  # half way between 60 and 50, less 40
    assert half.psnr.above
    assert half.faster is None
    assert half.inside is not None
    assert half.inside.value == pytest.approx((1 / 60 + 1 / 50) / 2 * 40)
    slow = by_label["tomesd:ratio=0.2"]
    assert slow is not None
    assert slow.faster == pytest.approx(1.5)
    assert by_label["tomesd:ratio=0.7"] is None
    assert "no setting of ours is as fast" in matched_table(pairs)
    assert match(curves(found)["ours"], found[1]) is not None
    assert table(found).count("\n") == 8
    less = differences(found, "fast")
    assert "| tomesd:ratio=0.5 | 2.00x | 50% | -4.0 [" in less
    assert "| fast |" not in less


def test_only_pictures_that_all_methods_have_count() -> None:
    methods, _ = read_methods("plain,fast")
    found = points(methods, fake_rows("plain", 2.0, 99.0, prompts=9) + fake_rows("fast", 1.0, 40.0, prompts=4))
    assert [p.pictures for p in found] == [8, 8]
    assert points(methods, fake_rows("plain", 2.0, 99.0)) == []
