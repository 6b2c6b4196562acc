"""Which form of merging and unmerging with kept pairs is cheapest on this device?

One interleaved run over the shapes of merged layers, half of the tokens merged. In milliseconds, beside a copy of the
tokens, which is the least that reading and writing them once can take; and the largest error against a mean in fp64.
What is made once from the pairs is not timed. This is what `tome_sampler.pairing` was written by.

    python benchmarks/merge_form.py --device cpu --dtype bfloat16
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
from collections.abc import Callable
from functools import partial

import torch
from growth import destinations, half_merged, repeated
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from tome_sampler import Pairing
from tome_sampler.bench.timing import clock_of, take
from tome_sampler.matching import global_match

SHAPES = {"SD 1.5, 512 x 512": (64, 320), "SD 1.5, 1024 x 1024": (128, 320), "embedded": (64, 48)}  # side, channels
LONGEST = 64  # side up to which the form that grows with the square runs
AS_IT_IS = "as it is in the package"


def merges(x: Tensor, pairing: Pairing) -> dict[str, Callable[[], Tensor]]:
    """Forms of merging x (b n c) to (b m c)."""
    (b, n, c), m = x.shape, pairing.size.shape[1]
    flat, row = x.view(b * n, c), pairing.flat_row.long()
    size = pairing.size.flatten()
    order = row.argsort(stable=True)
    offsets = F.pad(size.long().cumsum(0), (1, 0))
    weight = (1 / size).repeat_interleave(size.long()).to(x.dtype)
    inverse = (1 / size)[:, None]
    across = row[:, None].expand(-1, c)
    sparse = torch.sparse_csr_tensor(offsets, order, weight, (b * m, b * n))
    dense = torch.zeros(b, m, n, device=x.device, dtype=x.dtype)
    dense[torch.arange(b, device=x.device).repeat_interleave(n), row % m, torch.arange(b * n, device=x.device) % n] = (
        inverse.flatten()[row].to(x.dtype)
    )
    head = (pairing.head.long() + torch.arange(b, device=x.device)[:, None] * n).flatten()
    gone = torch.ones(b * n, dtype=torch.bool, device=x.device).scatter_(0, head, False).nonzero().flatten()
    joins, short = row[gone], inverse.to(x.dtype)

    def index_add() -> Tensor:
        total = torch.zeros(b * m, c, device=x.device).index_add_(0, row, flat.float())
        return (total * inverse).to(x.dtype)

    def scatter_mean() -> Tensor:
        total = torch.zeros(b * m, c, device=x.device)
        return total.scatter_reduce_(0, across, flat.float(), "mean", include_self=False).to(x.dtype)

    def only_merged() -> Tensor:
        return flat.index_select(0, head).index_add_(0, joins, flat.index_select(0, gone)).mul_(short)

    return {
        AS_IT_IS: lambda: pairing.merge(x),
        "index_add_ of an fp32 copy": index_add,
        "scatter mean of an fp32 copy": scatter_mean,
        "gather, then segmented mean": lambda: torch.segment_reduce(flat[order], "mean", offsets=offsets),
        "sparse product": lambda: sparse @ flat,
        "dense product": lambda: dense @ x,
        "only the merged tokens added up": only_merged,
    }


def unmerges(y: Tensor, pairing: Pairing) -> dict[str, Callable[[], Tensor]]:
    """Forms of unmerging y (b m c) to (b n c)."""
    (b, m, c), n = y.shape, pairing.row.shape[1]
    flat, row = y.view(b * m, c), pairing.flat_row.long()
    across = pairing.row.long()[..., None].expand(-1, -1, c)
    dense = torch.zeros(b, n, m, device=y.device, dtype=y.dtype).scatter_(2, pairing.row.long()[..., None], 1)
    ones = torch.ones(b * n, device=y.device, dtype=y.dtype)
    sparse = torch.sparse_csr_tensor(torch.arange(b * n + 1, device=y.device), row, ones, (b * n, b * m))
    head = (pairing.head.long() + torch.arange(b, device=y.device)[:, None] * n).flatten()
    gone = torch.ones(b * n, dtype=torch.bool, device=y.device).scatter_(0, head, False).nonzero().flatten()
    joined = row[gone]

    def two_writes() -> Tensor:
        out = y.new_empty(b * n, c)
        return out.index_copy_(0, head, flat).index_copy_(0, gone, flat.index_select(0, joined))

    return {
        AS_IT_IS: lambda: pairing.unmerge(y),
        "index_select": lambda: flat.index_select(0, row),
        "gather": lambda: y.gather(1, across),
        "sparse product": lambda: sparse @ flat,
        "dense product": lambda: dense @ y,
        "kept ones and merged ones written apart": two_writes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    order = random.Random(0)  # in turn, each would always find in the cache what the same other one leaves there
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    print(f"{platform.machine()}, torch {torch.__version__}, 1 thread, {clock_of(device)}, {args.device}, {args.dtype}")
    bar = tqdm(total=len(SHAPES) * (args.rounds + 1), unit="round")
    for name, (side, channels) in SHAPES.items():
        x = torch.randn(2, side * side, channels, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        dst = destinations(side, device)
        pairing = half_merged(dst, *global_match(x[1:], dst))
        y = pairing.merge(x)
        mean = torch.zeros(2, *y.shape[1:], dtype=torch.float64, device=device)
        mean.scatter_add_(1, pairing.row.long()[..., None].expand_as(x), x.double()).div_(pairing.size[..., None])
        forms = {
            ("merge", "copy"): x.clone,
            **{("merge", form): call for form, call in merges(x, pairing).items()},
            **{("unmerge", form): call for form, call in unmerges(y, pairing).items()},
        }
        errors = {("merge", "copy"): 0.0}
        if side > LONGEST:
            forms = {key: call for key, call in forms.items() if key[1] != "dense product"}
        for key, call in list(forms.items())[1:]:
            expected = mean if key[0] == "merge" else y.double().gather(1, pairing.row.long()[..., None].expand_as(x))
            try:
                errors[key] = float((call().view_as(expected).double() - expected).abs().max())
            except (RuntimeError, NotImplementedError) as error:
                bar.write(f"{name}: {' '.join(key)} does not run: {str(error).partition(chr(10))[0]}")
                del forms[key]
        times: dict[tuple[str, str], list[float]] = {key: [] for key in forms}
        for number in range(args.rounds + 1):
            for key, call in order.sample(list(forms.items()), len(forms)):
                call()
                _, taken = take(partial(repeated, call, 4), device)
                if number:  # the first one warms up
                    times[key].append(taken.seconds / 4 * 1e3)
            bar.update()
        medians = {key: statistics.median(found) for key, found in times.items()}
        bar.write(
            f"\n{name}: 2 x {side * side} x {channels}\n| | form | ms | of a copy | error |\n|---|---|---|---|---|"
        )
        for key, milliseconds in medians.items():
            share = milliseconds / medians["merge", "copy"]
            bar.write(f"| {key[0]} | {key[1]} | {milliseconds:.3f} | {share:.2f}x | {errors[key]:.1e} |")


if __name__ == "__main__":
    main()
