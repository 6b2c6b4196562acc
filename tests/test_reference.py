"""What a session makes is what a slow, independent writing-down of each method makes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from tome_sampler import Layer, MergeConfig, MergeSession, ModelCall, Pairing
from tome_sampler.config import Search
from tome_sampler.importance import importance_on_grid, importance_rank
from tome_sampler.matching import grid_dst, pool_dst

LAYER = Layer("x", 0)
SIGMAS = torch.logspace(1, -1, 50).tolist()
EARLY, LATE = 5, 30  # steps: above and below where the early part of a run ends


def features(b: int, h: int, w: int, roughness: float = 0.5) -> Tensor:
    """Smooth token features with some noise (b h*w 8): some tokens alike, some not."""
    smooth = torch.nn.functional.interpolate(torch.randn(b, 8, 2, 2), (h, w), mode="bilinear")
    return (smooth + roughness * torch.randn(b, 8, h, w)).flatten(2).transpose(1, 2)


def run(
    config: MergeConfig, x: Tensor, size: tuple[int, int], importance: Tensor | None = None, step: int = 5
) -> tuple[Pairing, int]:
    """The session's pairing for rows [uncond; cond] x, after a call that showed `importance`; and its seed."""
    session = MergeSession(config, [*SIGMAS, 0.0])
    images = x.shape[0] // 2
    if importance is not None and step:
        with session.call(ModelCall.chunked(SIGMAS[step - 1], size, ("uncond", "cond"), images)):
            pass
        session.observe(importance[:, None], torch.zeros_like(importance[:, None]))
    with session.call(ModelCall.chunked(SIGMAS[step], size, ("uncond", "cond"), images)):
        pairing = session.merge(LAYER, torch.randn_like(x), x)
        assert pairing is not None
        return pairing, session._seed(LAYER)


@pytest.mark.parametrize("grid", [(8, 8), (6, 10), (7, 9)])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75])
@pytest.mark.parametrize("random", [False, True])
def test_tomesd(grid: tuple[int, int], ratio: float, random: bool) -> None:
    x = features(4, *grid)
    pairing, seed = run(MergeConfig.preset("tomesd", ratio=ratio, random=random), x, grid)
    dst = reference.top_left(*grid, 2) if not random else grid_dst(grid, 2, x.device, seed).index[0].tolist()
    for row in range(4):
        assert pairing.target[row].tolist() == reference.tomesd(x[row].numpy(), dst, int(x.shape[1] * ratio))
    assert pairing.size.shape[1] == x.shape[1] - int(x.shape[1] * ratio)


@pytest.mark.parametrize("threshold", [0.8, 0.95])
def test_ca_tome_merges_the_largest_count_of_the_batch_in_every_row(threshold: float) -> None:
    x = torch.cat([features(1, 8, 8, 0.05), features(1, 8, 8, 1.0)])  # one smooth image, one of noise
    pairing, seed = run(MergeConfig.preset("ca_tome", threshold=threshold), x, (8, 8))
    dst = grid_dst((8, 8), 2, x.device, seed).index[0].tolist()
    slow = reference.ca_tome(list(x.numpy()), dst, threshold)
    assert pairing.target.tolist() == slow
    merged = [sum(t != i for i, t in enumerate(row)) for row in slow]
    assert merged[0] == merged[1] > 0


@pytest.mark.parametrize("ratio", reference.TABLE)
def test_importance_based_merging_and_its_budget(ratio: float) -> None:
    h = w = 20
    n, r = h * w, int(h * w * ratio)
    x, importance = features(4, h, w), torch.rand(2, 2 * h, 2 * w)
    pairing, seed = run(MergeConfig.preset("importance", ratio=ratio), x, (2 * h, 2 * w), importance)
    ranked = importance_rank(importance_on_grid(importance, (h, w)))
    dst = pool_dst(ranked, r, 2, 1.4, seed)[0].index
    of_pool, unimportant, important, independent = reference.TABLE[ratio]
    for row in range(4):
        pooled = reference.pooled(importance[row % 2].numpy(), h, w)
        inside, chosen = set(reference.pool(pooled, r, 1.4)), dst[row % 2].tolist()
        assert len(inside) == pytest.approx(of_pool * n, abs=1)
        assert len(chosen) == n // 4
        assert set(chosen) <= inside
        target = pairing.target[row].tolist()
        assert target == reference.importance_based(x[row].numpy(), chosen, pooled, r)
        merged = {t for t in range(n) if target[t] != t}
        assert merged >= set(range(n)) - inside  # the unimportant always
        assert len(merged - inside) == pytest.approx(unimportant * n, abs=1)
        assert len(merged & inside) == pytest.approx(important * n, abs=1)
        untouched = inside - merged - set(chosen)
        assert len(untouched) == pytest.approx(independent * n, abs=1)
        for token in untouched:
            assert int(pairing.size[row, pairing.row[row, token]]) == 1


def test_importance_based_merging_prunes_on_the_grid_in_the_first_two_of_50_steps() -> None:
    x, config = features(2, 8, 8), MergeConfig.preset("importance")
    session = MergeSession(config, [*SIGMAS, 0.0])
    for step in range(4):
        with session.call(ModelCall.chunked(SIGMAS[step], (8, 8), ("uncond", "cond"), 1)):
            pairing, seed = session.merge(LAYER, x), session._seed(LAYER)
        session.observe(torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8))
        assert pairing is not None
        assert pairing.prune == (step < 2)
        dst = grid_dst((8, 8), 2, x.device, seed).index[0].tolist()
        slow = [reference.tomesd(row, dst, int(64 * 0.7)) for row in x.numpy()]
        assert (pairing.target.tolist() == slow) == (step < 2)
        if step < 2:
            y = torch.randn(2, 64, 3)
            heads = y.gather(1, pairing.target[..., None].expand(-1, -1, 3))
            assert torch.equal(pairing.unmerge(pairing.merge(y)), heads)


@pytest.mark.parametrize("grid", [(8, 8), (6, 10), (7, 9)])
@pytest.mark.parametrize("preset", ["default", "quality", "fast"])
@pytest.mark.parametrize("informed", [True, False])
@pytest.mark.parametrize("search", ["global", "local"])
@pytest.mark.parametrize("early", [True, False])
def test_our_presets(grid: tuple[int, int], preset: str, informed: bool, search: Search, early: bool) -> None:
    h, w = grid
    x = torch.cat([features(1, h, w, roughness) for roughness in (0.6, 0.1, 0.02) * 2])
    importance = torch.rand(3, h, w) if informed else None
    config = MergeConfig.preset(preset, min_tokens=0, search=search)
    assert SIGMAS[EARLY] > config.early_sigma > SIGMAS[LATE]
    pairing, _ = run(config, x, grid, importance, step=EARLY if early else LATE)
    assert config.threshold is not None
    assert config.early_ratio is not None
    near = 1 if search == "local" else 99
    counts = set()
    for row in range(6):
        image = row % 3  # the cond rows, the last three, speak for their images
        pooled = None if importance is None else reference.pooled(importance[image].numpy(), h, w)
        c = config
        if early:  # as many as always, of the smallest cells that have as many
            stride = {"quality": 2, "default": 2, "fast": 4}[preset]
            settings = (stride, c.early_ratio, 1.0, c.early_ratio, c.importance, near)
        else:
            settings = (c.stride, c.ratio, c.threshold, c.floor, c.importance, near)
        slow = reference.ours(x[3 + image].numpy(), pooled, h, w, *settings)
        assert pairing.target[row].tolist() == slow
        counts.add(sum(t != i for i, t in enumerate(slow)))
    assert pairing.size.shape[1] == h * w - min(counts)
    if early:
        assert len(counts) == 1
    elif preset == "default" and informed:
        assert len(counts) > 1  # every image its own


def test_features_that_agree_to_the_floor_and_to_the_ceiling() -> None:
    config = MergeConfig(min_tokens=0, floor=0.3, ratio=0.6, early_ratio=None)
    noise, flat = torch.randn(2, 64, 8), torch.ones(2, 64, 8) + 1e-4 * torch.randn(2, 64, 8)
    for x, share in ((noise, 0.3), (flat, 0.6)):
        pairing, _ = run(config, x, (8, 8))
        assert pairing.size.shape[1] == 64 - int(64 * share)


@pytest.mark.parametrize(
    "changes", [{"ratio": 0.0}, {"end": 0.0}, {"threshold": 1.0, "floor": 0.0, "early_ratio": 0.0}]
)
def test_nothing_to_merge_gives_no_pairing(changes: dict[str, Any]) -> None:
    session = MergeSession(MergeConfig(min_tokens=0, **changes), [*SIGMAS, 0.0])
    with session.call(ModelCall(SIGMAS[3], (8, 8), ("cond",), (0,))):
        assert session.merge(LAYER, torch.randn(1, 64, 8)) is None
    assert session.stats.to_dict()["merged_fraction"] == 0


def test_area_pooling_is_the_slow_one() -> None:
    importance = torch.rand(2, 12, 8)
    ours = importance_on_grid(importance, (6, 2))
    np.testing.assert_allclose(ours.numpy(), [reference.pooled(i.numpy(), 6, 2) for i in importance], rtol=1e-5)
