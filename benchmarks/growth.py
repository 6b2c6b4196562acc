"""How the cost of merging grows with the number of tokens, part by part, at the width of SD 1.5's finest level.

A reused pairing costs a merge and an unmerge, a new one a match besides. In nanoseconds per token, so that a level line
is a cost that grows as the tokens do; one thread, the process's own CPU time, rounds in which the sizes take turns.

By itself a part finds its tokens where its last turn left them, in the cache if they fit. In a block, where it is used,
it finds what the layers before it have left, so both are measured.

    python benchmarks/growth.py --dtype bfloat16 --plot growth.png
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from tome_sampler import MergeConfig, Pairing
from tome_sampler.bench.methods import KeptSession, raise_
from tome_sampler.bench.parts import seconds_in_parts
from tome_sampler.bench.report import plotter
from tome_sampler.bench.timing import clock_of, take
from tome_sampler.hosts.modules import attach
from tome_sampler.matching import Dst, cell_dst, global_match, largest, local_match
from tome_sampler.refresh import Once
from tome_sampler.session import ModelCall

SIDES = (32, 64, 96, 128, 192, 256)
CHANNELS, HEADS = 320, 8
PARTS = ("merge", "unmerge", "copy", "merge, in a block", "unmerge, in a block")
PARTS += ("local match", "global match", "attention saved")


def half_merged(dst: Dst, score: Tensor, nearest: Tensor) -> Pairing:
    """Half of the tokens merged, as a match (1 n) says, for cond and uncond alike."""
    n = score.shape[1]
    merged_away = largest(score.scatter(1, dst.index, -9.0), n // 2)
    target = torch.where(merged_away, nearest, torch.arange(n, device=score.device))
    return Pairing.from_target(target, n - n // 2).take(torch.zeros(2, dtype=torch.long, device=score.device))


def destinations(side: int, device: torch.device) -> Dst:
    """One in each cell of side x side tokens, by an importance that is drawn."""
    return cell_dst(torch.rand(1, side * side, generator=torch.Generator().manual_seed(1)).to(device), (side, side), 2)


def parts(side: int, dtype: torch.dtype, device: torch.device, longest: int) -> dict[str, Callable[[], Any]]:
    """What a layer of side x side tokens does, for one image with guidance. copy: the least that reading and writing
    all tokens once can take."""
    n, grid = side * side, (side, side)
    x = torch.randn(2, n, CHANNELS, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    metric = x[1:]
    dst = destinations(side, device)
    pairing = half_merged(dst, *local_match(metric, dst, grid, 2, 1))
    merged = pairing.merge(x)
    found = {
        "merge": lambda: pairing.merge(x),
        "unmerge": lambda: pairing.unmerge(merged),
        "copy": lambda: x.clone(),
        "local match": lambda: local_match(metric, dst, grid, 2, 1),
    }
    if side <= longest:  # what grows with the square
        whole, half = (t.view(2, -1, HEADS, CHANNELS // HEADS).transpose(1, 2) for t in (x, merged))
        found["global match"] = lambda: global_match(metric, dst)
        found["attention"] = lambda: F.scaled_dot_product_attention(whole, whole, whole)
        found["attention of half"] = lambda: F.scaled_dot_product_attention(half, half, half)
    return found


class Finest(nn.Module):
    """A transformer block of SD 1.5's finest level."""

    def __init__(self) -> None:
        super().__init__()
        self.block = BasicTransformerBlock(CHANNELS, HEADS, CHANNELS // HEADS, cross_attention_dim=768)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        out: Tensor = self.block(x, encoder_hidden_states=context)
        return out


class InBlock:
    """A block of side x side tokens whose self-attention keeps its pairs."""

    def __init__(self, model: nn.Module, side: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = (2, side * side, CHANNELS), (2, 77, 768)
        self._given = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
        self._model, self._device = model, device
        self._call = ModelCall.chunked(1.0, (side, side), ("uncond", "cond"), 1)
        config = MergeConfig(ratio=0.5, threshold=None, early_ratio=None, min_tokens=0, refresh=Once())
        self._session = KeptSession(config)
        self._session.begin_before(self._call)

    def run(self) -> None:
        with self._session.call(self._call):
            self._model(*self._given)

    def seconds(self, times: int) -> dict[str, float]:
        """What merging and unmerging take in a run, of so many."""
        detach = attach(self._model, self._session, lambda *_: None, raise_)
        try:
            self.run()  # makes the pairs, if it is the first one
            found = seconds_in_parts(lambda: repeated(self.run, times), self._device)
        finally:
            detach()
        return {f"{part}, in a block": found[part] / times for part in ("merge", "unmerge")}


def repeated(part: Callable[[], Any], times: int) -> None:
    """Keeps nothing: memory that is new each time would cost more than what is measured."""
    for _ in range(times):
        part()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--longest", type=int, default=128, help="side up to which attention and the global match run")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--plot", type=Path, help="also draw them (needs matplotlib)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pyplot, device = plotter() if args.plot else None, torch.device(args.device)
    taken: dict[int, dict[str, list[float]]] = {side: {} for side in SIDES}
    model = Finest().to(device, getattr(torch, args.dtype)).eval()
    in_blocks = {side: InBlock(model, side, getattr(torch, args.dtype), device) for side in SIDES}
    with torch.no_grad():
        for number in tqdm(range(-1, args.rounds), unit="round"):
            for side in SIDES:
                for name, part in parts(side, getattr(torch, args.dtype), device, args.longest).items():
                    quadratic = name.startswith(("attention", "global"))
                    if quadratic and number >= 3:
                        continue
                    part()
                    repeats = 1 if quadratic else max(1, 2**15 // side**2)
                    _, seconds = take(lambda part=part, repeats=repeats: repeated(part, repeats), device)
                    if number >= 0:
                        taken[side].setdefault(name, []).append(seconds.seconds / repeats / side**2 * 1e9)
                if 0 <= number < 3:
                    for name, spent in in_blocks[side].seconds(max(1, 2**14 // side**2)).items():
                        taken[side].setdefault(name, []).append(spent / side**2 * 1e9)
    rows = {side: {name: statistics.median(found) for name, found in parts.items()} for side, parts in taken.items()}
    for row in rows.values():
        if "attention" in row:
            row["attention saved"] = row.pop("attention") - row.pop("attention of half")
    print(
        f"{platform.machine()}, torch {torch.__version__}, 1 thread, {clock_of(device)}, {args.device}, {args.dtype}, "
        f"2 x tokens x {CHANNELS}, half of them merged; ns per token"
    )
    print(f"| tokens | {' | '.join(PARTS)} |\n|{'---|' * (1 + len(PARTS))}")
    for side, row in rows.items():
        print(f"| {side * side} | {' | '.join(f'{row[p]:.1f}' if p in row else '' for p in PARTS)} |")
    if args.json:
        args.json.write_text(json.dumps({"dtype": args.dtype, "ns_per_token": rows}, indent=1) + "\n")
    if pyplot:
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        for name in PARTS:
            points = [(side * side, row[name]) for side, row in rows.items() if name in row]
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ns per token")
        axes.set_title(f"cost of merging, 2 x tokens x {CHANNELS}, {args.dtype}, {args.device}")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(args.plot, dpi=110)


if __name__ == "__main__":
    main()
