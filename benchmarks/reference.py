"""Speed of merging beside reference attention: Zero123++'s layout and sizes, plain and merged, step by step in turn.

Stable Diffusion 2's U-Net at full width with random weights, and a processor of our own in place of Zero123++'s. In
each step the U-Net writes down the tokens of a condition of 320 x 320 pixels, unmerged, and then runs over the mosaic
of 640 x 960 with guidance, half of the finest level's tokens merged. CPU time of one thread, of both passes.

    python benchmarks/reference.py --json reference.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from pipelines import ReferenceAttention

from tome_sampler import MergeConfig, MergeSession, ModelCall, merging
from tome_sampler.bench.architectures import build

CONDITION, MOSAIC = (40, 40), (120, 80)  # latents of 320 x 320 and of 960 x 640 pixels
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HALF = MergeConfig(threshold=None, early_ratio=None)


def step(
    unet: Any, session: MergeSession | None, sigma: float, condition: Tensor, mosaic: Tensor, text: Tensor
) -> float:
    """CPU seconds of both passes."""
    ref: dict[str, Tensor] = {}
    timestep = torch.tensor(400)
    writing = nullcontext() if session is None else session.call(ModelCall(None, MOSAIC, (), ()))
    reading = (
        nullcontext() if session is None else session.call(ModelCall.chunked(sigma, MOSAIC, ("uncond", "cond"), 1))
    )
    began = time.process_time()
    with torch.no_grad():
        with writing:
            unet(condition, timestep, text[1:], cross_attention_kwargs={"mode": "w", "ref": ref})
        with reading:
            out = unet(mosaic, timestep, text, cross_attention_kwargs={"mode": "r", "ref": ref}).sample
        if session is not None:
            session.observe(out[1:], out[:1])
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--steps", type=int, default=4, help="the first makes pairs, the others reuse them")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dtype = DTYPES[args.dtype]
    unet: Any = build("sd21", dtype, torch.device("cpu"), 0)
    unet.set_attn_processor({name: ReferenceAttention(name, []) for name in unet.attn_processors})
    generator = torch.Generator().manual_seed(0)
    condition = torch.randn(1, 4, *CONDITION, generator=generator).to(dtype)
    mosaic = torch.randn(1, 4, *MOSAIC, generator=generator).to(dtype).repeat(2, 1, 1, 1)
    text = torch.randn(2, 77, 1024, generator=generator).to(dtype)
    sigmas = [1 - 0.5 * i / args.steps for i in range(args.steps + 1)]  # the first one warms up
    given = condition, mosaic, text
    plain, merged = [], []
    with merging(unet, HALF, sigmas=sigmas) as session:
        for number, sigma in enumerate(tqdm(sigmas, unit="step")):
            session.suspended = True  # the hooks are there and do nothing
            plain.append(step(unet, None, sigma, *given))
            session.suspended = False
            if number == 1:
                session.reset(sigmas)  # pairs are made in the first step that counts
            merged.append(step(unet, session, sigma, *given))
        stats = session.stats.to_dict()
    base = statistics.median(plain[1:])
    row = {
        "machine": f"{platform.machine()}, torch {torch.__version__}, 1 thread, {args.dtype}",
        "merged_fraction": stats["merged_fraction"],
        "layers": {name: [v["tokens_before"], v["tokens_after"]] for name, v in stats["layers"].items()},
        "plain": base,
        "new_pairs": merged[1],
        "reused_pairs": statistics.median(merged[2:]),
        "notes": stats["notes"],
    }
    print(f"{row['machine']}: {len(row['layers'])} layers, {stats['merged_fraction']:.0%} of their tokens merged")
    print("| step | CPU s | speed-up |\n|---|---|---|")
    for name in ("plain", "new_pairs", "reused_pairs"):
        print(f"| {name.replace('_', ' ')} | {row[name]:.1f} | {base / row[name]:.2f}x |")
    if args.json:
        args.json.write_text(json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    main()
