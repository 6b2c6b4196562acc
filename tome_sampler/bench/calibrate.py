"""From how many tokens merging an attention layer pays on this machine: the table of :mod:`tome_sampler.gate`."""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from tome_sampler import gate
from tome_sampler.bench import report
from tome_sampler.bench.backends import BACKENDS, attention_on
from tome_sampler.bench.measure import threads
from tome_sampler.bench.methods import KeptSession, raise_
from tome_sampler.bench.settings import device_of, in_range, one_of
from tome_sampler.bench.timing import take
from tome_sampler.config import MergeConfig
from tome_sampler.hosts.modules import attach
from tome_sampler.models import DTYPES
from tome_sampler.refresh import Always, Once
from tome_sampler.session import MergeSession, ModelCall

WIDTHS = ((48, 2), (320, 8), (640, 10), (1280, 20))
"""Channels and heads: the embedded model's, and those of the levels of SD 1.5 and SDXL."""
SIDES = (8, 12, 16, 24, 32, 48, 64)
"""Of square token grids."""
MARGIN = 0.03
"""What merging must save at least: less is not worth another picture, nor above noise."""
_TOKENS = 8192  # in one timing: short layers several times, above the clock's resolution


class Attention(nn.Module):
    """Self-attention with the projections that all hosts have."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(to(x), "b n (h d) -> b h n d", h=self.heads) for to in (self.to_q, self.to_k, self.to_v))
        out: Tensor = self.to_out(rearrange(functional.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))
        return out


class Block(nn.Module):
    """A model of one layer."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attn1 = Attention(channels, heads)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attn1(x)
        return out


def calibrate(
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
    *,
    repeats: int = 9,
    widths: Sequence[tuple[int, int]] = WIDTHS,
    sides: Sequence[int] = SIDES,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """A row for each width: from how many tokens merging half of them saves :data:`MARGIN` of the layer's time, if a
    match serves :data:`gate.CALLS` calls of the model ("kept") and if there is one in each ("always"). With guidance:
    two rows of tokens.

    The whole path is timed, hooks included. Where it does not pay at any length, twice the longest one is told.

    Raises:
        ValueError: torch has no such kernel here.
    """
    rows = []
    name = gate.backend_of(device.type) if backend == "auto" else backend
    kind = {"device": device.type, "backend": name, "dtype": str(dtype).removeprefix("torch.")}
    for channels, heads in tqdm(widths, unit="width", desc="calibrating", disable=not progress):
        model = Block(channels, heads).to(device, dtype).eval().requires_grad_(False)
        paying: list[tuple[bool, bool]] = []
        with attention_on(backend, model):
            for side in sides:
                kept, always = _saved(model, channels, side, device, dtype, repeats)
                paying.append((kept >= MARGIN, always >= MARGIN))
                if paying[-2:] == [(True, True)] * 2:  # longer ones pay more
                    break
        found = {key: _first(sides, [pays[i] for pays in paying]) for i, key in enumerate(("kept", "always"))}
        rows.append({**kind, "channels": channels, **found})
    return rows


def _first(sides: Sequence[int], paying: Sequence[bool]) -> int:
    """The shortest length from which on it pays at all that were tried."""
    never = len(paying) - len(list(itertools.takewhile(bool, reversed(paying))))
    return sides[never] ** 2 if never < len(paying) else 2 * sides[-1] ** 2


def run(args: argparse.Namespace) -> int:
    """``tome-sampler bench --calibrate``, which also says what it has found."""
    device, dtype = device_of(args.device), DTYPES[one_of("dtype", args.dtype, tuple(DTYPES))]
    backend = one_of("backend", args.backend, tuple(name for name in BACKENDS if name != "xformers"))
    repeats = in_range("repeats", (3 if args.quick else 9) if args.repeats is None else args.repeats, 1, 1000)
    with threads(in_range("threads", args.threads, 1, 1024)), torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        rows = calibrate(device, dtype, backend, repeats=repeats, progress=not args.quiet)
        machine = report.machine(device)
    path = gate.own_table()
    gate.write_table(path, machine, rows)
    print(f"{machine['device']}, {args.dtype}, attention {rows[0]['backend']}: merging pays from so many tokens on")
    print(f"| channels | if a match serves {gate.CALLS} model calls | if there is one in each |\n|---|---|---|")
    for row in rows:
        print(f"| {row['channels']} | {row['kept']} | {row['always']} |")
    print(f"kept in {path}; delete the file to go back to the built-in table")
    return 0


@torch.no_grad()
def _saved(
    model: nn.Module, channels: int, side: int, device: torch.device, dtype: torch.dtype, repeats: int
) -> tuple[float, float]:
    """Which part of a layer's time merging saves: with kept pairs, and with new ones in each call."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, side * side, channels, generator=generator).to(device, dtype)
    seen = torch.randn(2, 1, 1, side, side, generator=generator).to(device)
    call = ModelCall.chunked(1.0, (side, side), ("uncond", "cond"), 1)
    many = max(1, _TOKENS // (side * side))

    def plain() -> None:
        for _ in range(many):
            model(x)

    def merged(session: MergeSession) -> None:
        for _ in range(many):
            with session.call(call):
                model(x)
            session.observe(seen[0], seen[1])

    at_half = MergeConfig(ratio=0.5, threshold=None, early_ratio=None, min_tokens=0)
    sessions = [KeptSession(at_half.with_(refresh=policy)) for policy in (Always(), Once())]
    for session in sessions:
        session.begin_before(call)
    shares: list[tuple[float, float]] = []
    for number in range(-1, repeats):
        times = [take(plain, device)[1].seconds]
        for session in sessions:
            detach = attach(model, session, lambda *_: None, raise_)
            times.append(take(partial(merged, session), device)[1].seconds)
            detach()
        if number >= 0:  # the first one warms up
            without, made, reused = times
            shares.append((1 - (made + (gate.CALLS - 1) * reused) / gate.CALLS / without, 1 - made / without))
    kept, always = (statistics.median(share) for share in zip(*shares, strict=True))
    return kept, always
