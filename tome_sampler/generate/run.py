"""From a request to pictures on disk."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

import tome_sampler
from tome_sampler.config import MergeConfig
from tome_sampler.demo.report import fidelity
from tome_sampler.generate.request import Request, opened, write_png
from tome_sampler.models import Model, open_model
from tome_sampler.models.own_loop import calls_of, sample_in_pipeline
from tome_sampler.models.pipeline import PipelineModel
from tome_sampler.models.run import Sampled, Settings, sample, steps_left
from tome_sampler.overlay import to_bytes
from tome_sampler.saving import write_whole

_MARGIN, _LINE = 8, 20
_INK, _PAPER = (30, 30, 34), (250, 250, 248)
_SMALLEST = 256  # pixels of a picture's side on a sheet
_NUMBERED = re.compile(r"(\d{4,})-(seed|report)")  # what is written here


def generate(
    request: Request,
    out: Path,
    *,
    device: str = "cpu",
    batch: int = 1,
    compare: bool = False,
    allow_pickle: bool = False,
    progress: bool = True,
) -> str:
    """Draw what is asked for into the folder `out`; returns the text to show.

    Writes NNNN-seedS.png for each picture, an animated one for each clip, with `compare` NNNN-seedS-plain.png and
    NNNN-seedS-compare.png too, and NNNN-report.json, with the number of the first one; it says what is there, however
    the run ends. Numbers go on from those in the folder: nothing is overwritten.

    Raises:
        ValueError: something that is asked for cannot be had; memory does not suffice.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    with memory_said("--size, --batch or --frames"):
        model = open_model(
            request.model,
            device=device,
            dtype=request.dtype,
            config=request.model_config,
            allow_pickle=allow_pickle,
            motion=request.motion,
        )
        request, settings = with_defaults(request, model)
        prompts = [prompt for prompt in request.prompts for _ in range(request.count)]
        model.condition(prompts[:1], settings.size)  # a prompt that cannot be drawn is told before anything is sampled
        if request.scheduler is None:
            model.denoiser()
        steps = _steps(model, request, settings)
        image = None if request.image is None else read_image(Path(request.image), settings.size)
        ways: list[MergeConfig | None] = [None, request.config] if compare else [request.config]
        make_folder(out)
        first = 1 + max((int(found[1]) for p in out.iterdir() if (found := _NUMBERED.match(p.name))), default=-1)
        rows: list[dict[str, Any]] = []
        batches = [range(start, min(start + batch, len(prompts))) for start in range(0, len(prompts), batch)]
        with tqdm(total=steps * len(ways) * len(batches), desc="sampling", unit="step", disable=not progress) as bar:
            for numbers in batches:
                asked = [request.one(prompts[i], request.seed + i, request.config) for i in numbers]
                runs = [_sample(model, asked, settings, way, image, bar.update) for way in ways]
                for place, number in enumerate(numbers):
                    drawn = list(zip(ways, runs, strict=True))
                    rows.append(_write(asked[place], drawn, place, out, first + number))
                    _report(request, rows, out / f"{first:04d}-report.json")
    return "\n".join(_line(row) for row in rows) + f"\nin {out}"


def with_defaults(request: Request, model: Model) -> tuple[Request, Settings]:
    """The request with the model's usual values where it says none, and how to sample.

    Raises:
        ValueError: the model, k-diffusion or the pipeline cannot do it.
    """
    usual = model.usual
    if request.scheduler is not None and not isinstance(model, PipelineModel):
        raise ValueError(f"--scheduler needs a pipeline; {model.name} is sampled by k-diffusion alone")
    frames = usual.frames if request.frames is None else request.frames
    if frames is not None:
        if usual.most_frames is None:
            raise ValueError(f"frames is {frames}; {model.name} draws single pictures")
        if not 1 <= frames <= usual.most_frames:
            raise ValueError(f"frames is {frames}; it must be from 1 to {usual.most_frames} for {model.name}")
    settings = Settings(
        size=usual.size if request.size is None else request.size,
        steps=usual.steps if request.steps is None else request.steps,
        sampler=usual.sampler if request.sampler is None else request.sampler,
        cond_scale=usual.cond_scale if request.cond_scale is None else request.cond_scale,
        frames=frames,
    )
    model.latent_shape(settings.size)  # which says what is wrong with a size
    used = asdict(settings)
    if request.scheduler is not None:
        used["sampler"] = None  # the pipeline's own loop has none
    return replace(request, **used), settings


def make_folder(out: Path) -> None:
    """Make a folder, before there is anything to lose.

    Raises:
        ValueError: it cannot be made or written into.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out is {out}; it cannot be made: {error.strerror}") from None
    if not os.access(out, os.W_OK):
        raise ValueError(f"--out is {out}; it cannot be written into")


def read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """A picture file as (1 3 height width) in [-1, 1], scaled and cut to a size (height, width).

    Raises:
        ValueError: it is missing, or no picture that can be read.
    """
    with opened(path) as file:
        image = file.convert("RGB")
    height, width = size
    scale = max(height / image.height, width / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    return rearrange(torch.from_numpy(np.asarray(image).copy()), "h w c -> 1 c h w").float() / 127.5 - 1


def to_images(picture: Tensor) -> list[Image.Image]:
    """A picture (3 h w) in [-1, 1] as an image, a clip (frames 3 h w) as one for each frame."""
    return [Image.fromarray(to_bytes(frame).numpy()) for frame in (picture if picture.ndim == 4 else [picture])]


def _steps(model: Model, request: Request, settings: Settings) -> int:
    """Of a run, those that it tells of.

    Raises:
        ValueError: there are none, or the pipeline cannot run them.
    """
    strength = None if request.image is None else request.strength
    if request.scheduler is not None and isinstance(model, PipelineModel):
        return calls_of(model, settings.steps, request.scheduler, strength)
    return settings.steps if strength is None else steps_left(settings.steps, strength)


def _sample(
    model: Model,
    asked: list[Request],
    settings: Settings,
    way: MergeConfig | None,
    image: Tensor | None,
    update: Callable[[], Any],
) -> Sampled:
    prompts, seeds = [one.prompts[0] for one in asked], [one.seed for one in asked]
    common: dict[str, Any] = {
        "negative": asked[0].negative,
        "image": None if image is None else image.expand(len(asked), -1, -1, -1),
        "strength": asked[0].strength,
        "on_step": lambda step, session: update(),
    }
    function = sample
    if asked[0].scheduler is not None:
        function = partial(sample_in_pipeline, scheduler=asked[0].scheduler)
    return function(model, prompts, seeds, settings, way, **common)


def _write(
    asked: Request, runs: list[tuple[MergeConfig | None, Sampled]], place: int, out: Path, number: int
) -> dict[str, Any]:
    """Save one picture of each way to sample it; what the report says of it."""
    stem = f"{number:04d}-seed{asked.seed}"
    row: dict[str, Any] = {"prompt": asked.prompts[0], "seed": asked.seed}
    for way, sampled in runs:
        plain = way is None and len(runs) > 1
        name = f"{stem}-plain.png" if plain else f"{stem}.png"
        picture = sampled.pictures[place]
        if not torch.isfinite(picture).all():
            raise ValueError("the picture holds numbers that are not finite; --dtype fp32 or bf16 may help")
        write_png(to_images(picture), out / name, replace(asked, merging=None if way is None else way.to_dict()))
        row |= {"seconds_plain" if way is None else "seconds": sampled.seconds}
        row |= {"plain" if way is None else "merged": name}
        if sampled.stats is not None:
            row |= {key: sampled.stats[key] for key in ("merged_fraction", "notes")}
    if len(runs) > 1:
        (_, plain_run), (_, merged_run) = runs
        a, b = plain_run.pictures[place], merged_run.pictures[place]
        row["psnr"], row["ssim"] = fidelity(b, a)
        titles = (
            f"plain, {plain_run.seconds:.1f} s",
            f"merged {row['merged_fraction']:.0%}, {merged_run.seconds:.1f} s",
            f"difference x 4, {row['psnr']:.1f} dB",
        )
        frames = zip(to_images(a), to_images(b), to_images((b - a).abs() * 4 - 1), strict=True)
        row["compare"] = f"{stem}-compare.png"
        sheets = [side_by_side(panels, titles, asked.prompts[0]) for panels in frames]
        write_png(sheets, out / row["compare"], asked)
    return row


def _report(request: Request, rows: list[dict[str, Any]], path: Path) -> None:
    """Save what was drawn so far."""
    report = {
        "request": asdict(request),
        "pictures": rows,
        "versions": {"tome_sampler": tome_sampler.__version__, "torch": torch.__version__},
    }
    write_whole(path, (json.dumps(report, indent=2) + "\n").encode())


def side_by_side(panels: Sequence[Image.Image], titles: tuple[str, ...], above: str) -> Image.Image:
    """Pictures in a row, a title under each and a line above all."""
    scale = max(-(-_SMALLEST // max(panels[0].size)), 1)
    panels = [p.resize((p.width * scale, p.height * scale), Image.Resampling.NEAREST) for p in panels]
    width, height = panels[0].size
    sheet = Image.new("RGB", (_MARGIN + len(panels) * (width + _MARGIN), height + 2 * _LINE + 2 * _MARGIN), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    longest = int(sheet.width / 6.5)
    draw.text((_MARGIN, 4), above if len(above) <= longest else above[: longest - 3] + "...", _INK, font)
    for i, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        left = _MARGIN + i * (width + _MARGIN)
        sheet.paste(panel, (left, _LINE + _MARGIN))
        draw.text((left, _LINE + _MARGIN + height + 2), title, _INK, font)
    return sheet


def _line(row: dict[str, Any]) -> str:
    parts = [row.get("merged") or row["plain"]]
    if "merged_fraction" in row:
        parts.append(f"{row['merged_fraction']:.0%} of the tokens merged")
    parts.append(" / ".join(f"{row[key]:.1f} s" for key in ("seconds_plain", "seconds") if key in row))
    if "psnr" in row:
        parts.append(f"{row['psnr']:.1f} dB, SSIM {row['ssim']:.4f} to plain")
    return ", ".join([*parts, *row.get("notes", [])])


@contextmanager
def memory_said(less: str) -> Iterator[None]:
    """Memory that ran out, in one line. less: the options of which less takes less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and "out of memory" not in text and "can't allocate memory" not in text:
            raise
        raise ValueError(f"there is too little memory for this: take a smaller {less}, or --dtype bf16") from error
