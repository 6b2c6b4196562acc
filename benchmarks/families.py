"""Each family of models through its real diffusers pipeline, at its published layout and picture size: what is merged.

Narrow, with random weights: layers and tokens are those of the real models, times and pictures are not. A similarity
means nothing on random weights, so half of the tokens are merged whatever they are.

    python benchmarks/families.py
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import pipelines

from tome_sampler import MergeConfig, merging

HALF = MergeConfig(threshold=None, early_ratio=None, min_tokens=0)


def text() -> dict[str, Any]:
    """Text for a pipeline without a text encoder of its kind."""
    given: dict[str, Any] = {"prompt": None, "negative_prompt": None}
    for name in ("prompt", "negative_prompt"):
        given |= {f"{name}_embeds": torch.randn(1, 5, pipelines.TEXT), f"{name}_attention_mask": torch.ones(1, 5)}
    return given


RUNS: dict[str, tuple[Any, int, dict[str, Any], dict[str, Any]]] = {
    # name: pipeline, pixels, what it is called with, settings
    "SD 1.5": (pipelines.sd, 512, {"prompt": "a"}, {}),
    "SD 2.1": (lambda: pipelines.sd("sd21"), 768, {"prompt": "a"}, {}),
    "SDXL": (pipelines.sdxl, 1024, {"prompt": "a"}, {}),
    "SDXL, levels=2": (pipelines.sdxl, 1024, {"prompt": "a"}, {"levels": 2}),
    "PixArt-alpha": (pipelines.pixart, 1024, {**text(), "use_resolution_binning": False}, {}),
    "PixArt-alpha, attn1+attn2 by position": (
        pipelines.pixart, 1024, {**text(), "use_resolution_binning": False},
        {"modules": ("attn1", "attn2"), "metric": "position"},
    ),
    "AnimateDiff, 16 frames": (pipelines.animate, 512, {"prompt": "a", "num_frames": 16}, {}),
}  # fmt: skip


def measure(name: str, steps: int) -> dict[str, Any]:
    """What was merged in one run."""
    build, side, given, settings = RUNS[name]
    pipe = build()
    with merging(pipe, HALF.with_(**settings)) as session:
        pipe(
            num_inference_steps=steps,
            height=side,
            width=side,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            **given,
        )
        stats = session.stats.to_dict()
    rows = len(stats["steps"]) * 2 * given.get("num_frames", 1)
    sizes = Counter((v["tokens_before"] // rows, v["tokens_after"] // rows) for v in stats["layers"].values())
    return {
        "family": name,
        "pixels": side,
        "layers": [{"layers": count, "before": a, "after": b} for (a, b), count in sizes.items()],
        "notes": stats["notes"],
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", action="append", choices=list(RUNS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| family | pixels | merged layers | tokens before | after |\n|---|---|---|---|---|")
    for name in args.only or RUNS:
        row = measure(name, args.steps)
        rows.append(row)
        for part in row["layers"]:
            print(f"| {name} | {row['pixels']} | {part['layers']} | {part['before']} | {part['after']} |", flush=True)
        for note in row["notes"]:
            print(f"note: {note}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
