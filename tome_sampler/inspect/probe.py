"""A session that looks at a run and merges nothing: what could be merged in each call, and what pairs keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tome_sampler.config import MergeConfig
from tome_sampler.hosts.modules import attached
from tome_sampler.matching import global_match, grid_dst, mean_similarity
from tome_sampler.pairing import Pairing
from tome_sampler.session import Layer, MergeSession, ModelCall

BINS = 200
"""Of the histograms, from -1 to 1."""
_SAMPLE = 256  # pairs of each layer and call whose similarity is followed


@dataclass
class Look:
    """One layer in one model call.

    tokens: n. histogram: (BINS,) shares of the sources, over their best cosine similarity to a destination, the first
    token of each cell (Saghatchian et al. 2025, figure 2). merged: share of the tokens that the configuration would
    merge. jaccard: distance between the pairs of this call and those of the one before, 0 .. 1, None in the first
    (figure 4). kept: for each call so far, this one last, the mean similarity that its pairs have now, None
    where it had none.
    """

    tokens: int
    histogram: list[float]
    merged: float
    jaccard: float | None
    kept: list[float | None]


@dataclass
class Watched:
    """One model call. layers: by name, of the merged levels."""

    sigma: float
    layers: dict[str, Look] = field(default_factory=dict)


class Probe(MergeSession):
    """Pairs are made anew in each call and not used: the run stays plain. ``calls`` holds what was seen in it."""

    def __init__(self, config: MergeConfig, sigmas: list[float] | None = None) -> None:
        # the policy stays, as the size gate asks how many calls a match will serve
        super().__init__(config.with_(share_layers=False, start=0.0, end=1.0, prune_until=0.0), sigmas, restarts=True)

    def reset(self, sigmas: Sequence[float] | None = None) -> None:
        super().reset(sigmas)
        self.calls: list[Watched] = []
        self._targets: dict[str, Tensor] = {}  # of the call before
        self._samples: dict[str, list[tuple[Tensor, Tensor] | None]] = {}

    def begin(self, call: ModelCall) -> None:
        if call.sigma is not None:
            self.calls.append(Watched(call.sigma))
        super().begin(call)
        if self._part == 0:  # not the same evaluation's call for the other branch
            self._cache.clear()

    def merge(
        self, layer: Layer, x: Tensor, metric: Tensor | None = None, grid: tuple[int, int] | None = None
    ) -> Pairing | None:
        self._pays = True
        pairing = super().merge(layer, x, metric, grid)
        if self.calls and self.stats.calls and layer.name in self.stats.calls[-1].layers:  # of a merged level
            b, n, _ = x.shape
            target = torch.arange(n, device=x.device).repeat(b, 1) if pairing is None else pairing.target
            self.calls[-1].layers[layer.name] = self._look(layer, x if metric is None else metric, target)
        return None

    def _worth(self, *args: Any) -> list[bool] | None:
        """Pairs that would not pay are made all the same: how long they last is asked of other thresholds, too."""
        worth = super()._worth(*args)
        self._pays = worth is None or any(worth)
        return None

    @torch.no_grad()
    def _look(self, layer: Layer, metric: Tensor, target: Tensor) -> Look:
        n = metric.shape[1]
        grid = self.grid(n)
        assert grid is not None  # or the layer would have been passed through
        score, _ = global_match(metric, grid_dst(grid, self.config.stride, metric.device, None))
        best = score[score > -2].float()
        histogram = torch.histc(best.clamp(-1, 1), BINS, -1, 1) / best.numel()
        own = torch.arange(n, device=target.device)
        jaccard = None
        before = self._targets.get(layer.name)
        if before is not None and before.shape == target.shape:
            common = ((target == before) & (target != own)).sum()
            either = (target != own).sum() + (before != own).sum() - common
            jaccard = 1 - float(common / either.clamp(min=1))
        self._targets[layer.name] = target
        samples = self._samples.setdefault(layer.name, [])
        order = (target != own).float().argsort(dim=1, descending=True, stable=True)
        least = int((target != own).sum(1).min())
        place = torch.linspace(0, max(least - 1, 0), min(_SAMPLE, max(least, 1)), device=target.device).long()
        token = order[:, place]
        samples.append((token, target.gather(1, token)) if least else None)
        return Look(
            tokens=n,
            histogram=histogram.tolist(),
            merged=float((target != own).float().mean()) if self._pays else 0.0,
            jaccard=jaccard,
            kept=[None if sample is None else float(mean_similarity(metric, *sample)) for sample in samples],
        )


@contextmanager
def probing(model: Any, config: MergeConfig, sigmas: list[float] | None = None) -> Iterator[Probe]:
    """Within it, a model or a diffusers pipeline runs as it is, and the probe looks. Pipelines tell it of their calls,
    and a :class:`tome_sampler.CFGDenoiser` does; after a pipeline's second run it holds what was seen in that."""
    probe = Probe(config, sigmas)
    with attached(model, probe):
        yield probe
