"""Which form of proportional attention is cheaper on this device: a mask, or one more q/k channel?

One interleaved run over the shapes of merged layers; the median time over that of attention without log(size). This is
what `tome_sampler.attention.FORM` was chosen by.

    python benchmarks/attention_form.py --device cpu --dtype float32
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from contextlib import nullcontext

import torch
from torch.nn import functional as F

from tome_sampler.attention import KeyBias, proportional_attention

SHAPES = {  # batch, heads, tokens after merging, channels of a head
    "embedded 64x64, half": (2, 2, 2048, 24),
    "SD1.5 512, half": (2, 8, 2048, 40),
    "SD1.5 512, a quarter": (2, 8, 1024, 40),
    "SD2.1 768, half": (2, 5, 4608, 64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"{platform.machine()}, torch {torch.__version__}, {threads} threads, {args.device}, {args.dtype}")
    print("| shape | plain, ms | mask | channel |\n|---|---|---|---|")
    for name, (b, heads, m, d) in SHAPES.items():
        q, k, v = torch.randn(3, b, heads, m, d, device=args.device, dtype=getattr(torch, args.dtype))
        bias = KeyBias(torch.randint(1, 5, (b, m), device=args.device).float().log())
        forms = {
            "plain": nullcontext(),
            "mask": proportional_attention(bias, "mask"),
            "channel": proportional_attention(bias, "channel"),
        }
        times: dict[str, list[float]] = {form: [] for form in forms}
        for round_ in range(args.rounds + 2):
            for form, mode in forms.items():
                if args.device == "cuda":
                    torch.cuda.synchronize()
                started = time.perf_counter()
                with mode:
                    F.scaled_dot_product_attention(q, k, v)
                if args.device == "cuda":
                    torch.cuda.synchronize()
                if round_ >= 2:  # the first two warm up
                    times[form].append(time.perf_counter() - started)
        plain = statistics.median(times["plain"])
        ratios = {form: statistics.median(times[form]) / plain for form in forms}
        print(f"| {name} | {plain * 1e3:.1f} | {ratios['mask']:.2f}x | {ratios['channel']:.2f}x |")


if __name__ == "__main__":
    main()
