"""Sample the embedded model plain and merged, from the same seeds, and show both.

Writes into --out:
  sheet.png    per prompt: plain | merged | their difference | importance | what was merged into what
  report.json  times, speed-up, PSNR and SSIM to the plain picture, tokens merged, settings, versions
  report.md    the same to read

examples:
  tome-sampler demo
  tome-sampler demo --preset fast --steps 30 --sampler heun
  tome-sampler demo --ratio 0.5 --prompt "a large red ring in the middle on wavy navy"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tome_sampler.config import PRESETS, MergeConfig

HELP = "sample the embedded model plain and merged, side by side"

PROMPTS = (
    "a large red circle at the top left, a small blue cross in the middle, a large white ring at the bottom right "
    "on striped teal",
    "a large yellow triangle at the left, a small black square at the top right on wavy navy",
    "a large purple cross at the bottom, a small green circle at the top on checked pink",
    "a large blue ring in the middle on dotted brown",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), metavar="DIR", help="folder to write (default %(default)s)"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="what to draw, one to three objects and a background; repeat it for more (default: four captions)",
    )
    parser.add_argument("--steps", type=int, default=20, help="sampling steps, at least 2 (default %(default)s)")
    parser.add_argument("--sampler", default="dpmpp_2m", help="a k-diffusion sampler's name (default %(default)s)")
    parser.add_argument("--cond-scale", type=float, default=3.0, help="guidance scale; 1 is none (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first picture; each next one has the next (default 0)"
    )
    parser.add_argument(
        "--preset", default="default", choices=list(PRESETS), help="settings to start from (default %(default)s)"
    )
    parser.add_argument(
        "--ratio", type=float, help="merge this fraction of the tokens, 0 to 0.75 (0.9375 with --stride 4)"
    )
    parser.add_argument(
        "--threshold", type=float, help="merge tokens from this similarity on, -1 to 1; then --ratio is the most"
    )
    parser.add_argument("--stride", type=int, help="one destination per stride x stride cell, at least 2")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps (default %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def config_of(args: argparse.Namespace) -> MergeConfig:
    """The preset with what the command line overrides; a ratio is that of all the run, and a
    fixed one without a threshold."""
    overrides = {
        name: getattr(args, name) for name in ("ratio", "threshold", "stride") if getattr(args, name) is not None
    }
    if "ratio" in overrides:
        overrides.setdefault("threshold", None)
        overrides["early_ratio"] = None  # in all of the run
    return MergeConfig.preset(args.preset, **overrides)


def run(args: argparse.Namespace) -> int:
    config = config_of(args)
    from tome_sampler.demo.compare import compare
    from tome_sampler.demo.report import write_report

    comparison = compare(
        args.prompt or list(PROMPTS),
        config,
        steps=args.steps,
        sampler=args.sampler,
        cond_scale=args.cond_scale,
        seed=args.seed,
        device=args.device,
        progress=not args.quiet,
    )
    print(write_report(comparison, args.out))
    return 0
