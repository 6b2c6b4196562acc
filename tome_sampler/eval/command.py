"""Draw prompts plain and by every method, from the same seeds, and say how much of the picture each keeps.

Methods, in turn for each prompt and seed; fields after a colon:
  plain              what all others are compared with; always there
  tomesd:ratio=0.5   the package tomesd; ca-tome:r=0.7: the package ca-tome, r is its threshold
  default ...        any preset of ours, and of ours that reproduce papers: importance, ca_tome
  deepcache          the package DeepCache, every third step whole; default+deepcache: a preset together with it
  plain:other_seed=1, plain:more_steps=1   plain against itself, which says what a difference means

Per picture, against plain of the same seed: PSNR, SSIM, MS-SSIM, gradient magnitude similarity deviation, errors inside
and outside of what the caption names, U-Net seconds, tokens merged. Over the set: are the captions' objects there, and
the scene Frechet distance (not FID: its features are of a small network that was trained on drawn scenes).

A run that was stopped goes on when the same command is given again. Under "accelerate launch" prompts are shared out.

examples:
  tome-sampler eval --prompts 4 --json out/eval/rows.jsonl --markdown out/eval/table.md
  tome-sampler eval --methods tomesd:ratio=0.5,importance:ratio=0.5,default:ratio=0.5,threshold=None --json rows.jsonl
  tome-sampler eval --model model.safetensors --prompt-file prompts.txt --json rows.jsonl --plot plot.png
  accelerate launch --multi_gpu --num_processes 4 -m tome_sampler eval --prompts 200 --seeds 2 --json rows.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "how much of the picture each way of merging keeps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is drawn")
    what.add_argument("--model", metavar="M", help="as generate takes it (default: the embedded model)")
    what.add_argument("--model-config", metavar="DIR", help="as generate takes it")
    what.add_argument("--allow-pickle", action="store_true", help="read pickled checkpoints too, see generate")
    what.add_argument(
        "--dtype", default="fp32", help="of a checkpoint's weights: fp32, fp16, bf16 (default %(default)s)"
    )
    what.add_argument("--prompts", type=int, default=8, help="how many random held-out captions (default %(default)s)")
    what.add_argument("--prompt-file", type=Path, metavar="FILE", help="prompts instead, one a line")
    what.add_argument("--first-seed", type=int, default=0, help="of the captions and pictures (default %(default)s)")
    what.add_argument("--seeds", type=int, default=1, help="pictures a prompt (default %(default)s)")
    what.add_argument("--methods", metavar="A,B", help="see above (default: packages that are there, and our presets)")
    how = parser.add_argument_group("how")
    how.add_argument("--steps", type=int, help="sampling steps (default: the model's usual)")
    how.add_argument("--sampler", help="a k-diffusion sampler's name (default: the model's usual)")
    how.add_argument("--cond-scale", type=float, help="guidance scale (default: the model's usual)")
    how.add_argument("--negative", default="", metavar="TEXT", help="what not to draw")
    how.add_argument("--size", metavar="SIDE|HxW", help="pixels (default: the model's usual)")
    how.add_argument("--batch", type=int, default=1, help="pictures at a time (default %(default)s)")
    how.add_argument("--device", help="cpu, cuda, cuda:1 (default: cpu, or what accelerate gives)")
    how.add_argument(
        "--threads", type=int, default=1, help="CPU threads; with one, CPU time is measured (default %(default)s)"
    )
    how.add_argument("--quiet", action="store_true", help="no progress bar")
    out = parser.add_argument_group("output, besides the printed table")
    out.add_argument("--json", type=Path, metavar="FILE", help="a line a picture; a run goes on from what is in it")
    out.add_argument("--markdown", type=Path, metavar="FILE", help="the tables")
    out.add_argument("--plot", type=Path, metavar="FILE", help="fidelity against speed, a PNG (needs matplotlib)")
    out.add_argument("--sheet", type=Path, metavar="FILE", help="best, median and worst pictures of ours, a PNG")
    out.add_argument("--pictures", type=Path, metavar="DIR", help="every picture, a PNG each in a folder a method")
    out.add_argument(
        "--matched",
        metavar="CURVE",
        help="which settings of ours are compared with others at their speed: 'ours', presets that differ only in how "
        "much they merge, or such as ours:proportional=False (default: the curve with the most points)",
    )
    out.add_argument("--against", metavar="METHOD", help="also all methods' figures less this one's")
    real = parser.add_argument_group("for real checkpoints: weights that you have; nothing is downloaded")
    real.add_argument("--lpips", type=Path, metavar="FILE", help="torchvision's AlexNet weights: LPIPS (torchmetrics)")
    real.add_argument("--clip", type=Path, metavar="DIR", help="a CLIP model's folder: CLIP score (transformers)")
    real.add_argument(
        "--inception",
        type=Path,
        metavar="FILE",
        help="torch-fidelity's Inception weights: FID and KID; with --pictures",
    )
    real.add_argument(
        "--reference", type=Path, metavar="DIR", help="pictures that FID and KID compare with (default: the plain ones)"
    )


def run(args: argparse.Namespace) -> int:
    from tome_sampler.eval.evaluate import evaluate

    return evaluate(args)
