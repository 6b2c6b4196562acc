"""Measure how fast merging is, how fast it could be, and how fast other packages are, in one interleaved run.

Methods, in turn within each round:
  plain          the model as it is
  bound          the merged layers return at once: nothing that merges these layers can be faster
  zero_overhead  the merged layers are given ready-made short sequences: matching, merging and unmerging cost nothing
  tomesd         the package tomesd; ca-tome: the package ca-tome, with pairs made (/refresh) and reused (/reuse)
  default ...    any preset of ours, e.g. ca_tome, quality, fast: NAME/refresh makes pairs in this step, NAME/reuse uses
                 those of the step before, NAME is the mix of both in a run. Fields after a colon: default:ratio=0.7.
                 With an early_ratio, steps above early_sigma are NAME/early refresh and NAME/early reuse, NAME is the
                 mix of all four, and zero_overhead is measured /early and /later, and mixed as its method is
  deepcache, hypertile, PRESET+deepcache   for comparison, if these packages are installed

plain is always measured, and zero_overhead of each method that merges (tomesd, ca-tome, presets): speed-ups are over
the one, shares of the speed of the other; plain's share is of the first one. bound and zero_overhead are limits of the
methods that are named with them. Models have the published layouts and random weights, on which a similarity means
nothing: there, presets merge --ratio of the tokens, without a threshold, and before early_sigma their early_ratio as
always; default:early_ratio=None merges the same in all of a run.
"embedded" is the small trained model of the demonstration; it runs the presets as they are. On pixart and animatediff
the other packages do not run: they are made for Stable Diffusion's U-Nets.

examples:
  tome-sampler bench --arch embedded --quick
  tome-sampler bench --arch embedded --size 32,64,96 --methods plain,default --steps 20
  tome-sampler bench --arch sd15 --size 512 --methods plain,bound,tomesd,ca_tome,default
  tome-sampler bench --arch sd15,sdxl --size 512,1024 --dtype bf16 --steps 20,50 --json bench.json --plot bench.png
  tome-sampler bench --arch sd15 --device cuda --dtype fp16 --backend flash --batch 1,4 --methods default:ratio=0.7
  tome-sampler bench --arch pixart --size 1024 --dtype bf16 --methods plain,bound,default
  tome-sampler bench --arch animatediff --frames 4 --dtype bf16 --methods plain,bound,default
  tome-sampler bench --read 512.json,768.json,1024.json --methods plain,bound,tomesd,default --plot speed.png
  tome-sampler bench --calibrate --device cuda --dtype fp16
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "how fast merging is, how fast it could be, how fast others are"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("what is measured")
    model.add_argument(
        "--arch",
        default="sd15",
        metavar="A,B",
        help="sd15, sd21, sdxl, pixart, animatediff, embedded; tiny, for tests (default %(default)s)",
    )
    model.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="real weights for --arch sd15, sd21 or sdxl: a diffusers folder or a single .safetensors file, local",
    )
    model.add_argument(
        "--size",
        metavar="N,M",
        help="pixels a side, multiples of 64 from 512 to 2048 (default 512); embedded: multiples of 32 from 32 to 256 "
        "(default 128, as it was trained)",
    )
    model.add_argument(
        "--batch", default="1", metavar="N,M", help="images; guidance doubles them (default %(default)s)"
    )
    model.add_argument(
        "--frames", type=int, metavar="N", help="of a clip, 1 to 32, for animatediff (default: 16, as it was trained)"
    )
    model.add_argument("--dtype", default="fp32", metavar="D", help="fp32, bf16 or fp16 (default %(default)s)")
    model.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 (default %(default)s)")
    model.add_argument(
        "--backend",
        default="auto",
        metavar="B",
        help="attention kernels: auto, flash, efficient, math, or xformers (default %(default)s)",
    )
    model.add_argument(
        "--calibrate",
        action="store_true",
        help="instead of all this, find from how many tokens merging a layer pays on this machine, for --device, "
        "--dtype and --backend, and keep it: min_tokens='auto' reads it from then on",
    )
    what = parser.add_argument_group("methods")
    what.add_argument("--methods", metavar="A,B", help="see above (default: all that can be had)")
    what.add_argument(
        "--ratio", type=float, default=0.5, help="tokens merged by tomesd, and on random weights (default %(default)s)"
    )
    what.add_argument("--modules", metavar="A,B", help="parts of a block that presets merge, as MergeConfig's modules")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--steps",
        default="0",
        metavar="N,M",
        help="also whole runs of so many steps, with the refresh policy in force; 0: none (default %(default)s)",
    )
    how.add_argument("--repeats", type=int, help="timed rounds (default 5; 1 with --quick)")
    how.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads; with one, its CPU time is measured (default %(default)s)",
    )
    how.add_argument("--quick", action="store_true", help="one round, fewer methods: does it work, roughly how fast")
    how.add_argument("--seed", type=int, default=0, help="of weights, noise and packages (default %(default)s)")
    how.add_argument("--quiet", action="store_true", help="no progress bar")
    out = parser.add_argument_group("output, besides the printed table")
    out.add_argument(
        "--json", type=Path, metavar="FILE", help='everything, as it comes: {"machine": ..., "results": [...]}'
    )
    out.add_argument("--markdown", type=Path, metavar="FILE", help="the table")
    out.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="speed-ups as a picture (needs matplotlib): bars, or curves over several sizes, of whole runs if there "
        "are any",
    )
    out.add_argument(
        "--read",
        metavar="FILE,FILE",
        help="measure nothing: print and draw what --json has written before, of --methods if they are named",
    )


def run(args: argparse.Namespace) -> int:
    if args.calibrate:
        from tome_sampler.bench.calibrate import run as calibrate

        if args.json or args.markdown or args.plot or args.read:
            raise ValueError(
                "--calibrate writes its own table; it goes with none of --json, --markdown, --plot and --read"
            )
        return calibrate(args)
    from tome_sampler.bench import report
    from tome_sampler.bench.measure import measure
    from tome_sampler.bench.reading import read
    from tome_sampler.bench.settings import Settings
    from tome_sampler.saving import require_place, write_whole

    pyplot: Any = report.plotter() if args.plot else None
    for option in ("json", "markdown", "plot"):
        if getattr(args, option) is not None:
            require_place(option, getattr(args, option))
    if args.plot:
        report.require_picture(args.plot)
    if args.read:
        if args.json:
            raise ValueError("--read measures nothing; it does not go with --json")
        before = read(args.read, args.methods)
        text = "\n".join(report.markdown(machine, rows) for machine, rows in before)
        rows = [row for _, rows in before for row in rows]
    else:
        for machine, rows in measure(Settings.of(args), progress=not args.quiet):
            if args.json:  # what comes later may fail, or be stopped
                report.write_json(args.json, machine, rows)
        text = report.markdown(machine, rows)
    print(text, end="")
    if args.json:  # with what was noted last
        report.write_json(args.json, machine, rows)
    if args.markdown:
        write_whole(args.markdown, text.encode())
    if args.plot:
        report.plot(pyplot, rows, args.plot)
    return 0
