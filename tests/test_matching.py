from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from tome_sampler.matching import (
    Dst,
    cell_dst,
    cell_size,
    global_match,
    grid_dst,
    hashed_uniform,
    largest,
    local_match,
    pool_dst,
    share_above,
)

CPU = torch.device("cpu")
GRIDS = [(h, w) for h in range(1, 10) for w in range(1, 10)]
STRIDES = [2, 3, 4]


def cells(h: int, w: int, stride: int, whole: bool) -> list[list[int]]:
    """The tokens of each cell, row by row; with `whole`, without those that the edge cuts."""
    sy, sx = min(stride, h), min(stride, w)
    found = []
    for top in range(0, h, sy):
        for left in range(0, w, sx):
            tokens = [y * w + x for y in range(top, min(top + sy, h)) for x in range(left, min(left + sx, w))]
            if not whole or len(tokens) == sy * sx:
                found.append(tokens)
    return found


def test_hashed_numbers_are_the_same_for_a_seed_and_uniform() -> None:
    for seed in (0, 1, 12345, (1 << 32) - 1):
        u = hashed_uniform(20_000, seed, CPU)
        assert torch.equal(u, hashed_uniform(20_000, seed, CPU))
        assert torch.equal(u[:100], hashed_uniform(100, seed, CPU))
        assert float(u.min()) >= 0
        assert float(u.max()) < 1
        share = torch.histc(u, 20, 0, 1) / 1000
        assert (share - 1).abs().max() < 0.15
        assert abs(float(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1])) < 0.03
    neighbours = torch.stack([hashed_uniform(20_000, s, CPU) for s in (7, 8)])
    assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 0.03


@pytest.mark.parametrize("stride", STRIDES)
def test_grid_destinations_are_one_in_each_whole_cell(stride: int) -> None:
    for h, w in GRIDS:
        whole = cells(h, w, stride, whole=True)
        for seed in (None, 0, 1):
            dst = grid_dst((h, w), stride, CPU, seed)
            assert dst.cells == (h // min(stride, h), w // min(stride, w))
            assert dst.index.shape == (1, len(whole))
            for token, cell in zip(dst.index[0].tolist(), whole, strict=True):
                assert token in cell
                assert seed is not None or token == cell[0]


def test_random_grid_destinations_reach_every_place_of_a_cell() -> None:
    picks = torch.cat([grid_dst((8, 8), 2, CPU, seed).index for seed in range(40)])
    offsets = (picks // 8 % 2) * 2 + picks % 2
    assert (offsets.flatten().bincount(minlength=4) / offsets.numel() - 0.25).abs().max() < 0.05


@pytest.mark.parametrize("stride", STRIDES)
def test_cell_destinations_are_the_most_important_of_each_cell_cut_ones_included(stride: int) -> None:
    for h, w in GRIDS:
        rank = torch.rand(2, h * w)
        rank[1] = 0.5  # all alike: the first of each cell
        dst = cell_dst(rank, (h, w), stride)
        every = cells(h, w, stride, whole=False)
        assert dst.index.shape == (2, len(every))
        assert dst.cells is not None
        assert dst.cells[0] * dst.cells[1] == len(every)
        for place, cell in enumerate(every):
            assert int(dst.index[0, place]) == max(cell, key=lambda t: float(rank[0, t]))
            assert int(dst.index[1, place]) == cell[0]


@pytest.mark.parametrize("stride", STRIDES)
def test_pool_destinations_are_distinct_in_the_pool_and_as_many_as_cells(stride: int) -> None:
    for n in (1, 2, 9, 16, 50, 81):
        rank = torch.rand(3, n)
        for ratio in (0.1, 0.5, 0.7, 1 - 1 / stride**2):
            r = int(n * ratio)
            dst, in_pool = pool_dst(rank, r, stride, 1.4, seed=3)
            k = max(n // stride**2, 1)
            members = max(min(int(1.4 * (n - r)), n), k)
            assert dst.cells is None
            assert dst.index.shape == (3, k)
            assert (in_pool.sum(1) == members).all()
            for row in range(3):
                best = set(rank[row].argsort(descending=True)[:members].tolist())
                chosen = dst.index[row].tolist()
                assert set(in_pool[row].nonzero()[:, 0].tolist()) == best
                assert len(set(chosen)) == k
                assert set(chosen) <= best
            assert torch.equal(pool_dst(rank[1:2], r, stride, 1.4, seed=3)[0].index[0], dst.index[1])


def slow_match(
    metric: Tensor, dst: list[int], allowed: dict[int, set[int]] | None = None
) -> tuple[list[float], list[int]]:
    """Each token's best destination in plain Python, of one image, in doubles."""
    unit = [v / max(float(np.linalg.norm(v)), 1e-6) for v in metric.double().numpy()]
    scores, tokens = [], []
    for token in range(len(unit)):
        options = [d for d in dst if allowed is None or d in allowed[token]]
        score, where = max(((float(unit[token] @ unit[d]), -d) for d in options), default=(-2.0, 0))
        scores.append(score)
        tokens.append(-where)
    return scores, tokens


def near_cells(h: int, w: int, stride: int, dst: Dst, neighbourhood: int) -> dict[int, set[int]]:
    """For each token the destinations whose cell is at most `neighbourhood` cells from its own."""
    sy, sx = cell_size((h, w), stride)
    assert dst.cells is not None
    home = {d: divmod(place, dst.cells[1]) for place, d in enumerate(dst.index[0].tolist())}
    return {
        t: {d for d, (cy, cx) in home.items() if max(abs(t // w // sy - cy), abs(t % w // sx - cx)) <= neighbourhood}
        for t in range(h * w)
    }


@pytest.mark.parametrize("grid", [(1, 1), (1, 8), (7, 1), (5, 5), (6, 9), (8, 8)])
@pytest.mark.parametrize("stride", STRIDES)
def test_the_global_match_is_the_slow_one(grid: tuple[int, int], stride: int) -> None:
    h, w = grid
    metric = torch.randn(2, h * w, 6)
    for dst in (grid_dst(grid, stride, CPU, 5), cell_dst(torch.rand(2, h * w), grid, stride)):
        score, nearest = global_match(metric, dst)
        for row in range(2):
            index = dst.index.expand(2, -1)[row].tolist()
            slow_score, slow_nearest = slow_match(metric[row], index)
            for token in index:  # a destination goes nowhere
                slow_score[token], slow_nearest[token] = -2.0, token
            torch.testing.assert_close(score[row].double(), torch.tensor(slow_score).double(), atol=1e-5, rtol=0)
            assert nearest[row].tolist() == slow_nearest


@pytest.mark.parametrize("grid", [(1, 1), (1, 8), (7, 1), (5, 5), (6, 9), (9, 7)])
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("neighbourhood", [1, 2])
def test_the_local_match_is_the_slow_one_of_neighbours(grid: tuple[int, int], stride: int, neighbourhood: int) -> None:
    h, w = grid
    metric = torch.randn(1, h * w, 6)
    for dst in (grid_dst(grid, stride, CPU, 5), cell_dst(torch.rand(1, h * w), grid, stride)):
        score, nearest = local_match(metric, dst, grid, stride, neighbourhood)
        allowed = near_cells(h, w, stride, dst, neighbourhood)
        slow_score, slow_nearest = slow_match(metric[0], dst.index[0].tolist(), allowed)
        torch.testing.assert_close(score[0].double(), torch.tensor(slow_score).double(), atol=1e-5, rtol=0)
        reached = torch.tensor(slow_score) > -2
        assert torch.equal(nearest[0][reached], torch.tensor(slow_nearest)[reached])


def test_a_local_match_of_destinations_without_cells_is_refused() -> None:
    with pytest.raises(ValueError, match="one destination per cell"):
        local_match(torch.randn(1, 4, 2), Dst(torch.tensor([[0]]), None), (2, 2), 2, 1)


def test_a_zero_vector_is_similar_to_nothing_and_never_nan() -> None:
    metric = torch.randn(1, 16, 4)
    metric[0, [1, 5, 6]] = 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        dst = grid_dst((4, 4), 2, CPU, None)
        for score, nearest in (global_match(metric.to(dtype), dst), local_match(metric.to(dtype), dst, (4, 4), 2, 1)):
            assert torch.isfinite(score).all()
            assert score[0, [1, 5, 6]].abs().max() == 0
            assert set(nearest.flatten().tolist()) <= set(dst.index[0].tolist())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_token_that_is_not_finite_is_similar_to_nothing(bad: float) -> None:
    metric, dst = torch.randn(1, 16, 4), grid_dst((4, 4), 2, CPU, None)
    metric[0, 5] = bad  # no destination
    assert 5 not in dst.index
    for score, nearest in (global_match(metric, dst), local_match(metric, dst, (4, 4), 2, 1)):
        assert torch.isfinite(score).all()
        assert score[0, 5] == 0
        assert set(nearest.flatten().tolist()) <= set(dst.index[0].tolist())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_finds_as_similar_destinations(dtype: torch.dtype, tolerance: float) -> None:
    metric = torch.randn(1, 256, 32) * 300  # squares overflow in fp16
    dst = grid_dst((16, 16), 2, CPU, 1)
    for match in (global_match, lambda m, d: local_match(m, d, (16, 16), 2, 1)):
        exact, half = match(metric, dst)[0], match(metric.to(dtype), dst)[0]
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, exact, atol=tolerance, rtol=0)


@pytest.mark.parametrize("penalised", [False, True])
def test_a_sample_tells_how_many_pass_a_threshold(penalised: bool) -> None:
    metric = torch.randn(2, 48 * 64, 8)
    metric[1, torch.rand(48 * 64) < 0.4] = 1.0
    dst = grid_dst((48, 64), 2, CPU, 1)
    penalty = torch.rand(2, 48 * 64) * 0.2 if penalised else None
    score = global_match(metric, dst)[0] - (0.0 if penalty is None else penalty)
    for threshold in (-1.5, 0.5, 0.9, 1.1):
        passing = score >= threshold
        passing.scatter_(1, dst.index.expand(2, -1), False)
        share = share_above(threshold, metric, dst, penalty)
        torch.testing.assert_close(share, passing.float().mean(1), atol=0.1, rtol=0)
        assert (share == 0.0).tolist() == [not row.any() for row in passing]


@pytest.mark.parametrize("grid", [(1, 2), (2, 3), (5, 1), (8, 8), (17, 23), (167, 263), (131, 333), (258, 416)])
def test_a_sample_is_of_the_sources_and_small_but_for_small_pictures(grid: tuple[int, int]) -> None:
    """At 167 x 263 and the two after it the last one's place, rounded, would be one beyond the last source."""
    n = grid[0] * grid[1]
    dst = cell_dst(torch.zeros(1, n), grid, 2)
    sources, sample = dst.sources(n)[0].tolist(), dst.sample(n)[0].tolist()
    assert set(sample) <= set(sources)
    assert len(set(sample)) >= 0.9 * len(sample)  # two of neighbouring parts may be one
    assert len(sample) == min(max(math.ceil(len(sources) / 14), 32), len(sources))


def test_a_sample_of_no_sources_has_none_that_pass() -> None:
    dst = grid_dst((1, 1), 2, CPU, 1)
    assert share_above(-1.0, torch.randn(2, 1, 3), dst).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("width", [48, 52, 64, 76, 88, 96, 104, 116, 128, 152])
def test_a_sample_has_tokens_of_all_of_the_picture(width: int) -> None:
    """Also of one whose width the distance between two of them would divide."""
    columns = torch.eye(width).repeat(width, 1)[None]  # a token is like those of its own column
    penalty = torch.ones(1, width**2)
    seen = 0
    for column in range(0, width, 2):
        alone = penalty.scatter(1, torch.arange(column, width**2, width)[None], 0.0)
        seen += bool(share_above(0.5, columns, grid_dst((width, width), 2, CPU, None), alone) > 0)
    assert seen / (width // 2) > 0.8


def test_a_match_in_chunks_is_the_match_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    metric, dst = torch.randn(2, 60, 4), grid_dst((6, 10), 2, CPU, 1)
    at_once = global_match(metric, dst)
    monkeypatch.setattr("tome_sampler.matching._SCORES_AT_ONCE", 2 * 15 * 7)
    for whole, part in zip(at_once, global_match(metric, dst), strict=True):
        torch.testing.assert_close(part, whole)


@pytest.mark.parametrize("levels", [3, 1000])
def test_the_largest_are_the_first_of_a_stable_order(levels: int) -> None:
    key = torch.randint(levels, (5, 200)).float() / levels  # of three levels, most are alike
    key[:, ::7] = -math.inf
    order = key.argsort(dim=1, descending=True, stable=True)
    for count in (1, 70, 171, 200):
        expected = torch.zeros_like(key, dtype=torch.bool).scatter_(1, order[:, :count], True)
        assert torch.equal(largest(key, count), expected)
    counts = torch.tensor([[0], [1], [70], [171], [200]])
    for most in (None, 200):
        for row, mask in enumerate(largest(key, counts, most)):
            assert mask.nonzero().flatten().tolist() == sorted(order[row, : counts[row]].tolist())
    assert torch.equal(largest(key, torch.tensor([[70]]), 70), largest(key, 70))  # one for all


def test_destinations_touch_no_generator() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    grid_dst((8, 8), 2, CPU, 3)
    pool_dst(torch.rand(1, 64, generator=torch.Generator()), 40, 2, 1.4, 3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()
