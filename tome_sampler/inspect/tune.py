"""From what a probe saw to settings: which threshold merges the share that is wanted, how long pairs can be kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tome_sampler.config import MergeConfig
from tome_sampler.inspect.probe import BINS, Watched
from tome_sampler.refresh import Always, Refresh, SigmaRatio

RATIOS = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
"""Of sigma, that are tried for keeping pairs."""


@dataclass(frozen=True)
class Proposal:
    """Settings, and what they rest on. thresholds: (threshold, share of the tokens merged). refreshes: (ratio of sigma,
    mean similarity that is lost by keeping pairs so long, share of the calls that make new ones)."""

    config: MergeConfig
    thresholds: list[tuple[float, float]]
    refreshes: list[tuple[float, float, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "config": self.config.to_dict()}


def check_aims(config: MergeConfig, share: float, loss: float) -> None:
    """Say what is wrong with a share and a loss to tune to, before anything is run for it.

    Raises:
        ValueError: one is out of range.
    """
    if not 0 < share <= config.ratio:
        raise ValueError(f"the share to merge is {share:g}; it must be above 0 and at most the ratio, {config.ratio:g}")
    if not 0 <= loss <= 2:
        raise ValueError(f"the similarity that may be lost is {loss:g}; it must be from 0 to 2")


def propose(calls: Sequence[Watched], config: MergeConfig, share: float, loss: float) -> Proposal:
    """The highest threshold (of hundredths) that merges at least `share` of the tokens, over all layers and the calls
    that a threshold holds in, and the longest-lived pairs that lose at most `loss` of similarity.

    Args:
        share: 0 .. the configuration's ratio. loss: of cosine similarity, 0 .. 2.

    Raises:
        ValueError: nothing was seen, or the share or the loss is out of range.
    """
    if not any(call.layers for call in calls):
        raise ValueError("nothing was merged in this run, so there is nothing to tune")
    check_aims(config, share, loss)
    later = [call for call in calls if not config.is_early(call.sigma)] or calls
    thresholds = [(t / 100, merged_share(later, config, t / 100)) for t in range(100)]
    enough = [t for t, merged in thresholds if merged >= share - 1e-9]
    refreshes = [(ratio, *reuse(calls, config, SigmaRatio(ratio))) for ratio in RATIOS]
    good = [ratio for ratio, lost, _ in refreshes if lost <= loss]
    refresh: Refresh = SigmaRatio(max(good)) if good else Always()
    return Proposal(config.with_(threshold=max(enough, default=0.0), refresh=refresh), thresholds, refreshes)


def merged_share(calls: Sequence[Watched], config: MergeConfig, threshold: float) -> float:
    """The share of the tokens that a threshold merges, between the configuration's floor and ratio."""
    tokens = merged = 0.0
    for call in calls:
        for look in call.layers.values():
            first = round((threshold + 1) * BINS / 2)
            sources = 1 - 1 / config.stride**2
            wanted = sum(look.histogram[first:]) * sources
            tokens += look.tokens
            merged += look.tokens * max(min(wanted, config.ratio), min(config.floor, config.ratio))
    return merged / tokens


def reuse(calls: Sequence[Watched], config: MergeConfig, refresh: SigmaRatio) -> tuple[float, float]:
    """What keeping pairs by a policy loses in mean similarity against new ones in each call, and the share of calls
    with new ones, where the run's early part ends among them. A call that merges nothing loses nothing."""
    lost: list[float] = []
    made = looked = 0
    for name in dict.fromkeys(name for call in calls for name in call.layers):
        seen = [(call.sigma, call.layers[name].kept) for call in calls if name in call.layers]
        since = 0
        for now, (sigma, kept) in enumerate(seen):
            made_at = seen[since][0]
            due = made_at >= sigma * refresh.ratio * (1 - 1e-6) or made_at < sigma * (1 - 1e-3)
            if now == 0 or due or config.is_early(made_at) != config.is_early(sigma):
                since, made = now, made + 1
            looked += 1
            latest, oldest = kept[now], kept[since]
            if latest is not None and oldest is not None:
                lost.append(latest - oldest)
    return sum(lost) / max(len(lost), 1), made / looked
