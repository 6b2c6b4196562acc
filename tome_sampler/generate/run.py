"""From a request to pictures on disk."""

from __future__ import annotations

import json
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
from tome_sampler.generate.request import Request, write_png
from tome_sampler.models import Model, open_model
from tome_sampler.models.own_loop import sample_in_pipeline
from tome_sampler.models.pipeline import PipelineModel
from tome_sampler.models.run import Sampled, Settings, sample, steps_left
from tome_sampler.overlay import to_bytes

_MARGIN, _LINE = 8, 20
_INK, _PAPER = (30, 30, 34), (250, 250, 248)
_SMALLEST = 256  # pixels of a picture's side on a sheet


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
    NNNN-seedS-compare.png too, and report.json. Numbers go on from those in the folder: nothing is overwritten.

    Raises:
        ValueError: something that is asked for cannot be had; memory does not suffice.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    with _memory_said():
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
        image = None if request.image is None else read_image(Path(request.image), settings.size)
        ways: list[MergeConfig | None] = [None, request.config] if compare else [request.config]
        out.mkdir(parents=True, exist_ok=True)
        first = 1 + max((int(p.name[:4]) for p in out.glob("[0-9][0-9][0-9][0-9]-*.png")), default=-1)
        rows: list[dict[str, Any]] = []
        batches = [range(start, min(start + batch, len(prompts))) for start in range(0, len(prompts), batch)]
        steps = settings.steps if image is None else steps_left(settings.steps, request.strength)
        with tqdm(total=steps * len(ways) * len(batches), desc="sampling", unit="step", disable=not progress) as bar:
            for numbers in batches:
                asked = [request.one(prompts[i], request.seed + i, request.config) for i in numbers]
                runs = [_sample(model, asked, settings, way, image, bar.update) for way in ways]
                for place, number in enumerate(numbers):
                    drawn = list(zip(ways, runs, strict=True))
                    rows.append(_write(asked[place], drawn, place, out, first + number))
    report = {
        "request": asdict(request),
        "pictures": rows,
        "versions": {"tome_sampler": tome_sampler.__version__, "torch": torch.__version__},
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
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
    return replace(request, **asdict(settings)), settings


def read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """A picture file as (1 3 height width) in [-1, 1], scaled and cut to a size (height, width).

    Raises:
        ValueError: it is missing, or no picture.
    """
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"there is no {path}") from None
    except OSError as error:
        raise ValueError(f"{path} is no picture: {error}") from None
    height, width = size
    scale = max(height / image.height, width / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    return rearrange(torch.from_numpy(np.asarray(image).copy()), "h w c -> 1 c h w").float() / 127.5 - 1


def to_images(picture: Tensor) -> list[Image.Image]:
    """A picture (3 h w) in [-1, 1] as an image, a clip (frames 3 h w) as one for each frame."""
    return [Image.fromarray(to_bytes(frame).numpy()) for frame in (picture if picture.ndim == 4 else [picture])]


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
    """Save one picture of each way to sample it; what report.json says of it."""
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
def _memory_said() -> Iterator[None]:
    """Memory that ran out, in one line."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and "out of memory" not in text and "can't allocate memory" not in text:
            raise
        raise ValueError(
            "there is too little memory for this: take a smaller --size, --batch or --frames, or --dtype bf16"
        ) from error
