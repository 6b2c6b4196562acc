"""What merging did in a run: counts on the host, measurements on the device until somebody reads them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_Mark = float | torch.cuda.Event
_Span = tuple[_Mark, _Mark]


def _mark(device: torch.device) -> _Mark:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(first: _Mark, last: _Mark) -> float:
    if isinstance(first, torch.cuda.Event) and isinstance(last, torch.cuda.Event):
        last.synchronize()
        return float(first.elapsed_time(last)) / 1000
    return float(last) - float(first)  # type: ignore[arg-type]


@dataclass
class LayerStats:
    """One layer in one model call. Tokens are counted over all batch rows; after: what the layer worked on."""

    tokens_before: int = 0
    tokens_after: int = 0
    pairings_made: int = 0
    pairings_reused: int = 0
    similarity: list[Tensor] = field(default_factory=list)
    importance: list[Tensor] = field(default_factory=list)


@dataclass
class CallStats:
    """One model call. sigma is None where nobody told it."""

    sigma: float | None
    layers: dict[str, LayerStats] = field(default_factory=dict)


@dataclass
class Stats:
    """Statistics of a run, per model call and layer."""

    calls: list[CallStats] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, list[_Span]] = field(default_factory=dict)
    cache_bytes: int = 0
    """The most that the pairs kept for later calls took at once."""

    @contextmanager
    def timed(self, part: str, device: torch.device) -> Iterator[None]:
        """Within it, time counts for "matching" or "merging". On CUDA by events, so that nothing waits."""
        first = _mark(device)
        try:
            yield
        finally:
            self.seconds.setdefault(part, []).append((first, _mark(device)))

    def begin(self, sigma: float | None) -> None:
        """A model call starts."""
        self.calls.append(CallStats(sigma))

    def count(self, layer: str, before: int, after: int, made: bool | None) -> None:
        """A layer works on `after` instead of `before` tokens; on new pairs, cached ones, or (None) on none."""
        stats = self._layer(layer)
        stats.tokens_before += before
        stats.tokens_after += after
        stats.pairings_made += made is True
        stats.pairings_reused += made is False

    def take_back(self, layer: str, before: int, after: int) -> None:
        """A layer that was counted has run on all its tokens, because of an error before it began."""
        stats = self._layer(layer)
        stats.tokens_after += before - after
        stats.pairings_made = stats.pairings_reused = 0

    @property
    def merged(self) -> bool:
        """Whether any layer has run on merged tokens; of a batch perhaps on one image's, beside another's that is as
        long as before."""
        layers = (layer for call in self.calls for layer in call.layers.values())
        return any(layer.pairings_made or layer.pairings_reused for layer in layers)

    def measure(self, layer: str, similarity: Tensor, importance: Tensor) -> None:
        """New pairs were made: the mean similarity of the merged tokens, and their share of importance (or NaN)."""
        stats = self._layer(layer)
        stats.similarity.append(similarity)
        stats.importance.append(importance)

    def _layer(self, layer: str) -> LayerStats:
        if not self.calls:  # a part of a model that runs without anybody telling of a call
            self.begin(None)
        return self.calls[-1].layers.setdefault(layer, LayerStats())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: of the whole run, in `layers` for each layer, in `steps` for each model call, and in
        there for each layer again. This is where the device is read.

        tokens_before, tokens_after: summed over batch rows, layers and calls, of the layers on merged levels.
        merged_fraction: 1 - after / before, 0 .. 1. mean_similarity: of merged tokens to their destinations, when
        paired, -1 .. 1, or None. importance_merged: the share of all importance on tokens that were merged away, or
        None without importance. notes: what was passed through, and why. cache_bytes: the most that the pairs kept for
        later calls took at once. seconds_matching, seconds_merging: spent on
        making pairs, and on merging and unmerging, or None in a session that is not timed.
        """
        names = dict.fromkeys(name for call in self.calls for name in call.layers)
        return {
            **_summary(layer for call in self.calls for layer in call.layers.values()),
            "layers": {name: _summary(c.layers[name] for c in self.calls if name in c.layers) for name in names},
            "steps": [
                {
                    "sigma": call.sigma,
                    **_summary(call.layers.values()),
                    "layers": {name: _summary([layer]) for name, layer in call.layers.items()},
                }
                for call in self.calls
            ],
            "notes": list(self.notes),
            "cache_bytes": self.cache_bytes,
            **{f"seconds_{part}": self._seconds(part) for part in ("matching", "merging")},
        }

    def _seconds(self, part: str) -> float | None:
        spans = self.seconds.get(part)
        return None if spans is None else sum(_elapsed(first, last) for first, last in spans)


def _summary(layers: Iterable[LayerStats]) -> dict[str, Any]:
    found = list(layers)
    before, after = sum(s.tokens_before for s in found), sum(s.tokens_after for s in found)
    return {
        "tokens_before": before,
        "tokens_after": after,
        "merged_fraction": 1 - after / before if before else 0.0,
        "pairings_made": sum(s.pairings_made for s in found),
        "pairings_reused": sum(s.pairings_reused for s in found),
        "mean_similarity": _mean([value for s in found for value in s.similarity]),
        "importance_merged": _mean([value for s in found for value in s.importance]),
    }


def _mean(values: list[Tensor]) -> float | None:
    """The mean of those that are numbers; None where there are none."""
    mean = float(torch.stack([v.float() for v in values]).nanmean()) if values else math.nan
    return None if math.isnan(mean) else mean
