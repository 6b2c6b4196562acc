"""Does the embedded model draw what its caption says? Sampled on held-out captions, judged by tome_sampler.demo.check.

Held out means: a caption that no training step has seen, which the trainer's seed lets us know exactly. Nearly every
caption with a single object was seen, so most of these have two or three.

    python benchmarks/agreement.py --captions 200
    python benchmarks/agreement.py --captions 200 --preset default
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from tqdm import tqdm

import tome_sampler
from tome_sampler import CFGDenoiser, MergeConfig, demo
from tome_sampler.demo.check import agreement, check_scene
from tome_sampler.demo.model import LATENT_CHANNELS, LATENT_SIZE, to_picture
from tome_sampler.demo.scenes import Scene, random_scene
from tome_sampler.eval.prompts import trained_captions
from tome_sampler.sampling import sample_dpmpp_2m


def held_out(count: int, seed: int) -> list[Scene]:
    """Random scenes whose captions the shipped weights were not trained on."""
    rng, scenes = random.Random(seed), []
    while len(scenes) < count:
        scene = random_scene(rng)
        if scene.caption not in trained_captions():
            scenes.append(scene)
    return scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cond-scale", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--preset", help="sample merged (default: plain)")
    parser.add_argument("--weights", type=Path, default=demo.WEIGHTS)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    scenes, model = held_out(args.captions, args.seed), demo.load_model(args.weights)
    wrapped, verdicts, started = demo.denoiser(model), [], time.perf_counter()
    sigmas = wrapped.get_sigmas(args.steps)
    for first in tqdm(range(0, len(scenes), args.batch), unit="batch"):
        some = scenes[first : first + args.batch]
        generator = torch.Generator().manual_seed(args.seed * 100_000 + first)
        x = torch.randn(len(some), LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=generator) * sigmas[0]
        cond, uncond = demo.encode([s.caption for s in some], model), demo.encode([""] * len(some), model)
        extra_args = {"cond": cond, "uncond": uncond, "cond_scale": args.cond_scale}
        config = MergeConfig.preset(args.preset) if args.preset else MergeConfig(ratio=0)
        with tome_sampler.merging(model, config, sigmas=sigmas.tolist()) as session, torch.no_grad():
            latents = sample_dpmpp_2m(CFGDenoiser(wrapped, session), x, sigmas, extra_args=extra_args, disable=True)
        for picture, scene in zip(to_picture(latents), some, strict=True):
            verdicts += check_scene(picture, scene)
    right = agreement(verdicts)
    print(
        f"{args.preset or 'plain'}, dpmpp_2m, {args.steps} steps, cond_scale {args.cond_scale:g}: {len(scenes)} "
        f"held-out captions, {len(verdicts)} objects, {time.perf_counter() - started:.0f} s\n"
        + ", ".join(f"{name} {share:.1%}" for name, share in right.items())
    )
    if args.json:
        args.json.write_text(json.dumps({"captions": len(scenes), "objects": len(verdicts), **right}) + "\n")


if __name__ == "__main__":
    main()
