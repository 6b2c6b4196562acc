"""Speed and fidelity on the embedded model: plain, the real tomesd package, and presets, in one interleaved run.

Every method samples every prompt from the same seed, in turn, so that all meet the same load of the machine. Times
are those of the U-Net alone, wall clock; speed-ups are ratios to plain on the same prompt. PSNR and SSIM are to the
plain picture.

    python benchmarks/embedded.py --prompts 8
    python benchmarks/embedded.py --method tomesd:ratio=0.5 --method default:refresh=always --method fast
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomesd
import torch
from tqdm import tqdm

import tome_sampler
from tome_sampler import CFGDenoiser, demo, kdiffusion
from tome_sampler.demo.model import LATENT_CHANNELS, LATENT_SIZE, to_picture
from tome_sampler.demo.report import fidelity
from tome_sampler.demo.scenes import random_scene
from tome_sampler.spelling import read_config, read_overrides

METHODS = ("plain", "tomesd:ratio=0.5", "quality", "balanced", "fast", "ca_tome", "importance:ratio=0.5")


@contextmanager
def stopwatch(owner: Any, name: str, clock: dict[str, float], part: str) -> Iterator[None]:
    """Within it, the time spent in a method is added to clock[part]."""
    original = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            clock[part] = clock.get(part, 0.0) + time.perf_counter() - started

    setattr(owner, name, timed)
    try:
        yield
    finally:
        if isinstance(owner, type):
            setattr(owner, name, original)
        else:
            delattr(owner, name)


@contextmanager
def applied(method: str, model: torch.nn.Module, sigmas: list[float]) -> Iterator[tome_sampler.MergeSession | None]:
    """A method at work on the model: "plain", "tomesd:ratio=R" (the real package), or a preset with overrides."""
    name, _, rest = method.partition(":")
    if name == "plain":
        yield None
    elif name == "tomesd":
        tomesd.apply_patch(model.unet, **read_overrides(rest))
        try:
            yield None
        finally:
            tomesd.remove_patch(model.unet)
    else:
        with tome_sampler.merging(model, read_config(method), sigmas=sigmas) as session:
            yield session


def sample(method: str, caption: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One picture: the picture, U-Net seconds, seconds in matching (with its bookkeeping), merge and unmerge."""
    model, wrapped = demo.load_model(), demo.denoiser()
    sigmas = wrapped.get_sigmas(args.steps)
    sampler: Callable[..., Any] = getattr(kdiffusion.load("sampling"), f"sample_{args.sampler}")
    x = torch.randn(1, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=torch.Generator().manual_seed(seed))
    conditioning = demo.encode([caption, ""])
    extra_args = {"cond": conditioning[:1], "uncond": conditioning[1:], "cond_scale": args.cond_scale}
    clock: dict[str, float] = {}
    with (
        torch.no_grad(),
        applied(method, model, sigmas.tolist()) as session,
        stopwatch(model.unet, "forward", clock, "unet"),
        stopwatch(tome_sampler.MergeSession, "merge", clock, "matching"),
        stopwatch(tome_sampler.Pairing, "merge", clock, "merge"),
        stopwatch(tome_sampler.Pairing, "unmerge", clock, "unmerge"),
    ):
        torch.manual_seed(seed)
        latent = sampler(CFGDenoiser(wrapped, session), x * sigmas[0], sigmas, extra_args=extra_args, disable=True)
    return {
        "picture": to_picture(latent)[0],
        **{part: clock.get(part, 0.0) for part in ("unet", "matching", "merge", "unmerge")},
        "merged_fraction": session.stats.to_dict()["merged_fraction"] if session else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--method",
        action="append",
        help="NAME[:field=value,...], refresh as always, once, sigma_6, steps_5 or drift_0.05, modules as attn1+ff "
        f"(default: {' '.join(METHODS)})",
    )
    parser.add_argument("--prompts", type=int, default=8, help="how many random captions (default %(default)s)")
    parser.add_argument("--first-seed", type=int, default=10_000, help="the captions' and pictures' first seed")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sampler", default="dpmpp_2m")
    parser.add_argument("--cond-scale", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    methods = ["plain", *(m for m in args.method or METHODS if m != "plain")]
    rows: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    sample(methods[0], random_scene(random.Random(0)).caption, 0, args)  # warm-up
    with tqdm(total=args.prompts * len(methods), unit="picture") as bar:
        for number in range(args.prompts):
            seed = args.first_seed + number
            caption = random_scene(random.Random(seed)).caption
            turn = number % len(methods)
            taken = {}
            for method in methods[turn:] + methods[:turn]:
                taken[method] = sample(method, caption, seed, args)
                bar.update()
            for method, row in taken.items():
                row["psnr"], row["ssim"] = fidelity(row["picture"], taken["plain"]["picture"])
                row["speedup"] = taken["plain"]["unet"] / row["unet"]
                rows[method].append(
                    {k: v for k, v in row.items() if k != "picture"} | {"caption": caption, "seed": seed}
                )
    print(
        f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, {args.sampler}, "
        f"{args.steps} steps, cond_scale {args.cond_scale:g}, {args.prompts} prompts, 64x64 tokens, batch 2; medians"
    )
    print("| method | U-Net, s | speed-up | tokens merged | matching / merge / unmerge | PSNR, dB | SSIM |")
    print("|---|---|---|---|---|---|---|")
    for method, found in rows.items():
        keys = [k for k, v in found[0].items() if isinstance(v, float)]
        m = {key: statistics.median(row[key] for row in found) for key in keys}
        share = " / ".join(f"{m[key] / m['unet']:.1%}" for key in ("matching", "merge", "unmerge"))
        merged = f"{m['merged_fraction']:.0%}" if "merged_fraction" in m else ""
        print(
            f"| {method} | {m['unet']:.2f} | {m['speedup']:.2f}x | {merged} | {share} | "
            f"{m['psnr']:.1f} | {m['ssim']:.4f} |"
        )
    if args.json:
        args.json.write_text(json.dumps({"settings": vars(args) | {"json": str(args.json)}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
