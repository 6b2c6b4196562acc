"""What merging did in a run: counts on the host, measurements on the device until somebody reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class LayerStats:
    """One layer over a run. Tokens are counted per batch row and model call; after: what the layer worked on."""

    tokens_before: int = 0
    tokens_after: int = 0
    pairings_made: int = 0
    pairings_reused: int = 0


@dataclass
class CallStats:
    """One model call. sigma is None where nobody told it."""

    sigma: float | None
    tokens_before: int = 0
    tokens_after: int = 0
    pairings_made: int = 0
    pairings_reused: int = 0
    measured: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)


def _mean(values: Sequence[Tensor]) -> float | None:
    """The mean of those that are numbers; None where there are none. Reads from the device, once."""
    if not values:
        return None
    stacked = torch.stack([v.float() for v in values])
    mean = float(stacked.nanmean())
    return None if math.isnan(mean) else mean


@dataclass
class Stats:
    """Statistics of a run, per layer and per model call."""

    layers: dict[str, LayerStats] = field(default_factory=dict)
    calls: list[CallStats] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def begin(self, sigma: float | None) -> None:
        """A model call starts."""
        self.calls.append(CallStats(sigma))

    def measure(self, similarity: Tensor, importance: Tensor) -> None:
        """New pairs were made: the mean similarity of the merged tokens, and their share of importance (or NaN)."""
        self._latest().measured.append((similarity, importance))

    def count(self, layer: str, before: int, after: int, made: bool | None) -> None:
        """A layer worked on `after` instead of `before` tokens; on new pairs, cached ones, or (None) on none."""
        for target in (self.layers.setdefault(layer, LayerStats()), self._latest()):
            target.tokens_before += before
            target.tokens_after += after
            target.pairings_made += made is True
            target.pairings_reused += made is False

    def _latest(self) -> CallStats:
        if not self.calls:  # a part of a model runs by itself, and nobody told of a call
            self.begin(None)
        return self.calls[-1]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON. This is where the device is read.

        tokens_before, tokens_after: summed over layers and calls, of the layers on merged levels.
        merged_fraction: 1 - after / before, 0 .. 1. mean_similarity: of merged tokens to their destinations, when
        paired, -1 .. 1, or None. importance_merged: the share of all importance on tokens that were merged away, or
        None without importance. notes: what was passed through, and why.
        """
        before = sum(layer.tokens_before for layer in self.layers.values())
        after = sum(layer.tokens_after for layer in self.layers.values())
        measured = [pair for call in self.calls for pair in call.measured]
        return {
            "tokens_before": before,
            "tokens_after": after,
            "merged_fraction": 1 - after / before if before else 0.0,
            "pairings_made": sum(layer.pairings_made for layer in self.layers.values()),
            "pairings_reused": sum(layer.pairings_reused for layer in self.layers.values()),
            "mean_similarity": _mean([similarity for similarity, _ in measured]),
            "importance_merged": _mean([share for _, share in measured]),
            "layers": {name: vars(layer).copy() for name, layer in self.layers.items()},
            "steps": [
                {
                    **{k: v for k, v in vars(call).items() if k != "measured"},
                    "mean_similarity": _mean([similarity for similarity, _ in call.measured]),
                    "importance_merged": _mean([share for _, share in call.measured]),
                }
                for call in self.calls
            ],
            "notes": list(self.notes),
        }
