"""A comparison as pictures and figures: sheet.png, report.json, report.md."""

from __future__ import annotations

import json
import platform
import statistics
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

import tome_sampler
from tome_sampler.demo.compare import Comparison, Pair
from tome_sampler.overlay import group_map, heat_map, to_bytes

_PANEL = 256
_MARGIN = 12
_INK, _PAPER = (30, 30, 34), (250, 250, 248)


def fidelity(picture: Tensor, reference: Tensor) -> tuple[float, float]:
    """PSNR in dB (at most 99, for equal pictures) and SSIM of two pictures (3 h w) in [-1, 1], or of two clips
    (frames 3 h w): PSNR over all of its values, SSIM the mean of its frames."""
    a, b = (rearrange(p, "... c h w -> ... h w c").numpy().astype(np.float64) for p in (picture, reference))
    if np.array_equal(a, b):
        return 99.0, 1.0
    psnr = peak_signal_noise_ratio(b, a, data_range=2.0)
    frames = zip(*(p.reshape(-1, *p.shape[-3:]) for p in (b, a)), strict=True)
    ssim = [structural_similarity(x, y, data_range=2.0, channel_axis=2) for x, y in frames]
    return min(float(psnr), 99.0), float(np.mean(ssim))


def _image(picture: Tensor) -> Image.Image:
    return Image.fromarray(to_bytes(picture).numpy()).resize((_PANEL, _PANEL), Image.Resampling.NEAREST)


def _panels(pair: Pair) -> list[tuple[str, Image.Image]]:
    plain, merged = pair.plain, pair.merged
    difference = (merged.picture - plain.picture).abs() * 4 - 1
    blank = torch.full((3, 8, 8), -0.2)
    importance, groups = blank, blank
    if merged.importance is not None:
        importance = heat_map(merged.importance)
    if merged.pairing is not None:
        side = int(merged.pairing.row.shape[1] ** 0.5)
        groups = group_map(merged.picture, merged.pairing.target[0], (side, side), _PANEL)
    return [
        (f"plain, {plain.seconds:.1f} s", _image(plain.picture)),
        (f"merged, {merged.seconds:.1f} s", _image(merged.picture)),
        (f"difference x 4, {fidelity(merged.picture, plain.picture)[0]:.1f} dB", _image(difference)),
        ("importance" if merged.importance is not None else "no importance", _image(importance)),
        ("merged groups" if merged.pairing is not None else "nothing merged", _image(groups)),
    ]


def sheet(comparison: Comparison) -> Image.Image:
    """One row of five panels for each prompt."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    rows = [_panels(pair) for pair in comparison.pairs]
    step_x, step_y = _PANEL + _MARGIN, _PANEL + 62
    image = Image.new("RGB", (_MARGIN + len(rows[0]) * step_x, _MARGIN + len(rows) * step_y), _PAPER)
    draw = ImageDraw.Draw(image)
    for r, (row, pair) in enumerate(zip(rows, comparison.pairs, strict=True)):
        top = _MARGIN + r * step_y
        draw.text((_MARGIN, top), textwrap.shorten(f"“{pair.prompt}”, seed {pair.seed}", 170), _INK, font)
        for c, (title, panel) in enumerate(row):
            image.paste(panel, (_MARGIN + c * step_x, top + 24))
            draw.text((_MARGIN + c * step_x, top + 26 + _PANEL), title, _INK, small)
    return image


def _row(pair: Pair) -> dict[str, Any]:
    psnr, ssim = fidelity(pair.merged.picture, pair.plain.picture)
    stats = pair.merged.stats or {}
    return {
        "prompt": pair.prompt,
        "seed": pair.seed,
        "seconds_plain": pair.plain.seconds,
        "seconds_merged": pair.merged.seconds,
        "speedup": pair.plain.seconds / pair.merged.seconds,
        "psnr": psnr,
        "ssim": ssim,
        **{k: stats.get(k) for k in ("merged_fraction", "pairings_made", "pairings_reused", "notes")},
    }


def report(comparison: Comparison) -> dict[str, Any]:
    """What report.json holds: `prompts`, a list, and `overall`, their medians (pairings: sums), times in seconds."""
    rows = [_row(pair) for pair in comparison.pairs]
    overall: dict[str, Any] = {
        key: statistics.median(row[key] for row in rows)
        for key in ("seconds_plain", "seconds_merged", "speedup", "psnr", "ssim", "merged_fraction")
    }
    overall |= {key: sum(row[key] for row in rows) for key in ("pairings_made", "pairings_reused")}
    return {
        "overall": overall,
        "prompts": rows,
        "settings": {
            "config": comparison.config.to_dict(),
            "sampler": comparison.sampler,
            "steps": comparison.steps,
            "cond_scale": comparison.cond_scale,
            "device": comparison.device,
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "tome_sampler": tome_sampler.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
    }


def table(data: dict[str, Any]) -> str:
    """A report as a Markdown table, one line per prompt and one for all."""
    lines = [
        "| picture | plain, s | merged, s | speed-up | tokens merged | pairings made / reused | PSNR, dB | SSIM |",
        "|---|---|---|---|---|---|---|---|",
    ]
    named = [(textwrap.shorten(row["prompt"], 44, placeholder=" ..."), row) for row in data["prompts"]]
    for name, row in [*named, ("all (medians)", data["overall"])]:
        lines.append(
            f"| {name} | {row['seconds_plain']:.2f} | {row['seconds_merged']:.2f} | {row['speedup']:.2f}x | "
            f"{row['merged_fraction']:.0%} | {row['pairings_made']} / {row['pairings_reused']} | "
            f"{row['psnr']:.1f} | {row['ssim']:.4f} |"
        )
    return "\n".join(lines)


def write_report(comparison: Comparison, out: Path) -> str:
    """Write the three files into the folder `out`, making it; returns the text to show."""
    out.mkdir(parents=True, exist_ok=True)
    data = report(comparison)
    (out / "report.json").write_text(json.dumps(data, indent=2) + "\n")
    sheet(comparison).save(out / "sheet.png", optimize=True)
    settings = (
        f"{comparison.sampler}, {comparison.steps} steps, cond_scale {comparison.cond_scale:g}, {comparison.device}"
    )
    text = table(data)
    (out / "report.md").write_text(
        f"# Plain and merged\n\n{settings}\n\n{text}\n\n![plain and merged pictures](sheet.png)\n"
    )
    return f"{text}\n\n{settings}\npictures: {out / 'sheet.png'}\nfigures:  {out / 'report.json'}"
