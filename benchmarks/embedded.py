"""Speed and fidelity on the embedded model: plain, the real tomesd package, and presets, in one interleaved run.

Every method samples every prompt from the same seed, in turn, so that all meet the same load of the machine. Times
are those of the U-Net alone, wall clock; speed-ups are ratios to plain on the same prompt. PSNR and SSIM are to the
plain picture.

    python benchmarks/embedded.py --prompts 8
    python benchmarks/embedded.py --method plain --method tomesd:ratio=0.5 --method default --method fast:proportional=False
"""

from __future__ import annotations

import argparse
import ast
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
from tome_sampler import CFGDenoiser, MergeConfig, demo, kdiffusion
from tome_sampler.demo.model import LATENT_CHANNELS, LATENT_SIZE, to_picture
from tome_sampler.demo.report import fidelity
from tome_sampler.demo.scenes import random_scene

METHODS = ("plain", "tomesd:ratio=0.5", "quality", "balanced", "fast", "ca_tome", "importance:ratio=0.5")


@contextmanager
def stopwatch(owner: Any, name: str, clock: dict[str, float]) -> Iterator[None]:
    """Within it, the time spent in a method is added to clock[name]."""
    original = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            clock[name] = clock.get(name, 0.0) + time.perf_counter() - started

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
    overrides = {k: ast.literal_eval(v) for k, v in (pair.split("=") for pair in rest.split(",") if pair)}
    if name == "plain":
        yield None
    elif name == "tomesd":
        tomesd.apply_patch(model.unet, **overrides)
        try:
            yield None
        finally:
            tomesd.remove_patch(model.unet)
    else:
        if "refresh" in overrides:
            overrides["refresh"] = tome_sampler.refresh.refresh_from_dict(overrides["refresh"])
        with tome_sampler.merging(model, MergeConfig.preset(name, **overrides), sigmas=sigmas) as session:
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
    with torch.no_grad(), applied(method, model, sigmas.tolist()) as session, stopwatch(model.unet, "forward", clock):
        with (
            stopwatch(tome_sampler.MergeSession, "merge", clock),
            stopwatch(tome_sampler.Pairing, "unmerge", clock),
        ):
            matching_before = clock.get("merge", 0.0)
            pairing_merge = tome_sampler.Pairing.merge

            def merge(pairing: tome_sampler.Pairing, tokens: torch.Tensor) -> torch.Tensor:
                started = time.perf_counter()
                merged = pairing_merge(pairing, tokens)
                clock["averaging"] = clock.get("averaging", 0.0) + time.perf_counter() - started
                return merged

            tome_sampler.Pairing.merge = merge  # type: ignore[method-assign]
            try:
                torch.manual_seed(seed)
                latent = sampler(
                    CFGDenoiser(wrapped, session), x * sigmas[0], sigmas, extra_args=extra_args, disable=True
                )
            finally:
                tome_sampler.Pairing.merge = pairing_merge  # type: ignore[method-assign]
    return {
        "picture": to_picture(latent)[0],
        "unet": clock["forward"],
        "matching": clock.get("merge", 0.0) - matching_before,
        "merge": clock.get("averaging", 0.0),
        "unmerge": clock.get("unmerge", 0.0),
        "merged_fraction": session.stats.to_dict()["merged_fraction"] if session else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", action="append", help=f"NAME[:field=value,...] (default: {' '.join(METHODS)})")
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
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, {args.sampler}, "
          f"{args.steps} steps, cond_scale {args.cond_scale:g}, {args.prompts} prompts, 64x64 tokens, CFG batch 2; medians")  # fmt: skip
    print(
        "| method | U-Net, s | speed-up | tokens merged | matching / merge / unmerge | PSNR, dB | SSIM |\n|---|---|---|---|---|---|---|"
    )
    for method, found in rows.items():

        def median(key: str, found: list[dict[str, Any]] = found) -> float:
            return statistics.median(row[key] for row in found)

        share = " / ".join(f"{median(key) / median('unet'):.1%}" for key in ("matching", "merge", "unmerge"))
        merged = "" if found[0]["merged_fraction"] is None else f"{median('merged_fraction'):.0%}"
        print(f"| {method} | {median('unet'):.2f} | {median('speedup'):.2f}x | {merged} | {share} | "
              f"{median('psnr'):.1f} | {median('ssim'):.4f} |")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({"settings": vars(args) | {"json": str(args.json)}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
