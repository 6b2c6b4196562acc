"""Where the released packages and ours describe the same method they give the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tome_sampler import Layer, MergeConfig, MergeSession, ModelCall, Pairing

GRIDS = [(8, 8), (6, 10), (7, 9), (5, 5)]


def ours(config: MergeConfig, metric: Tensor, grid: tuple[int, int]) -> Pairing | None:
    session = MergeSession(config)
    with session.call(ModelCall(1.0, grid, ("cond",) * metric.shape[0], tuple(range(metric.shape[0])))):
        return session.merge(Layer("x", 0), metric, metric)


def assert_same(merge: Any, unmerge: Any, pairing: Pairing | None, grid: tuple[int, int], b: int) -> None:
    x = torch.randn(b, grid[0] * grid[1], 5)
    if pairing is None:
        torch.testing.assert_close(unmerge(merge(x)), x)
        return
    assert pairing.merge(x).shape == merge(x).shape
    torch.testing.assert_close(pairing.unmerge(pairing.merge(x)), unmerge(merge(x)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("stride", [2, 3, 4])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.75])
def test_tomesd(grid: tuple[int, int], stride: int, ratio: float) -> None:
    theirs = pytest.importorskip("tomesd.merge").bipartite_soft_matching_random2d
    metric, (h, w) = torch.randn(3, grid[0] * grid[1], 16), grid
    merge, unmerge = theirs(metric, w, h, stride, stride, int(h * w * ratio), no_rand=True)
    pairing = ours(MergeConfig.preset("tomesd", ratio=ratio, stride=stride, random=False), metric, grid)
    assert_same(merge, unmerge, pairing, grid, 3)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("threshold", [0.35, 0.5, 0.7, 0.99])
def test_ca_tome(grid: tuple[int, int], threshold: float) -> None:
    theirs = pytest.importorskip("ca_tome.merge").bipartite_soft_matching_random2d
    metric, (h, w) = torch.randn(2, grid[0] * grid[1], 6), grid
    cache = {"compute_on": [0], "merge": None, "unmerge": None}
    merge, unmerge = theirs(metric, w, h, 2, 2, threshold, cache, 0, no_rand=True)
    pairing = ours(MergeConfig.preset("ca_tome", threshold=threshold, random=False), metric, grid)
    if pairing is not None and merge(metric).shape[1] < h * w - int(h * w * 0.75):  # ours never merges above `ratio`
        pytest.skip("an indivisible grid has more sources than 0.75 of its tokens")
    assert_same(merge, unmerge, pairing, grid, 2)
