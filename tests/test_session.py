from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tome_sampler import PRESETS, Layer, MergeConfig, MergeSession, ModelCall, Pairing, merging
from tome_sampler.importance import cfg_magnitude, importance_on_grid, importance_rank
from tome_sampler.refresh import Always, Drift, Once, SigmaRatio

LAYER = Layer("x", 0)
SIZE = (8, 8)
BOTH = ("uncond", "cond")


def tokens(b: int = 2, h: int = 8, w: int = 8, c: int = 8) -> Tensor:
    smooth = nn.functional.interpolate(torch.randn(b, c, 3, 3), (h, w), mode="bicubic")
    return (smooth + 0.2 * torch.randn(b, c, h, w)).flatten(2).transpose(1, 2)


def preset(name: str, **overrides: Any) -> MergeConfig:
    return MergeConfig.preset(name, **{"min_tokens": 0, **overrides})


def one(
    session: MergeSession,
    x: Tensor,
    sigma: float | None = 1.0,
    branches: tuple[str, ...] = BOTH,
    size: tuple[int, int] | None = SIZE,
    layer: Layer = LAYER,
) -> Pairing | None:
    """The pairing of one model call with one layer."""
    with session.call(ModelCall.chunked(sigma, size, branches, x.shape[0] // len(branches))):
        return session.merge(layer, x, x)


def observe(session: MergeSession, importance: Tensor) -> None:
    session.observe(importance[:, None], torch.zeros_like(importance[:, None]))


def same(a: Pairing | None, b: Pairing | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.target, b.target)


def differ(a: Pairing | None, b: Pairing | None) -> bool:
    return not same(a, b)


@pytest.mark.parametrize("overrides", [{}, {"search": "local", "destinations": "cell"}, {"refresh": Drift(0.01)}])
@pytest.mark.parametrize("name", PRESETS)
def test_torch_s_default_precision_does_not_matter(name: str, overrides: dict[str, Any]) -> None:
    """Hosts set it to what their weights are in."""
    x, importance = tokens(), torch.rand(1, *SIZE)
    config = preset(name, **overrides)
    found = []
    for dtype in (torch.float32, torch.float16, torch.float64):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            session, seen = MergeSession(config), []
            for sigma in (9.0, 2.0, 1.9, 0.1):
                pairing = one(session, x, sigma)
                observe(session, importance)
                seen.append((pairing, None if pairing is None else pairing.unmerge(pairing.merge(x))))
            found.append(seen)
        finally:
            torch.set_default_dtype(before)
    for others in found[1:]:
        for (a, merged_a), (b, merged_b) in zip(found[0], others, strict=True):
            assert same(a, b)
            assert (merged_a is None and merged_b is None) or torch.equal(merged_a, merged_b)


# -- importance


def test_ranks_are_0_to_1_and_say_nothing_where_the_map_is_constant() -> None:
    ranks = importance_rank(torch.tensor([[0.3, 0.1, 0.2], [5.0, 5.0, 5.0]]))
    assert ranks.tolist() == [[1.0, 0.0, 0.5], [0.0, 0.0, 0.0]]
    assert importance_rank(torch.zeros(1, 4)).tolist() == [[0.0] * 4]
    assert importance_rank(torch.rand(1, 1)).tolist() == [[0.0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_count_as_the_mean_of_the_others(bad: float) -> None:
    importance = torch.tensor([[[1.0, bad], [3.0, 2.0]]])
    assert importance_on_grid(importance, (2, 2)).tolist() == [[1.0, 2.0, 3.0, 2.0]]
    everything = importance_rank(importance_on_grid(torch.full((1, 4, 4), bad), (2, 2)))
    assert everything.tolist() == [[0.0] * 4]


def test_importance_is_the_channel_mean_and_needs_two_alike_outputs() -> None:
    cond, uncond = torch.randn(2, 4, 3, 5, dtype=torch.float16), torch.randn(2, 4, 3, 5, dtype=torch.float16)
    torch.testing.assert_close(cfg_magnitude(cond, uncond), (cond.float() - uncond.float()).abs().mean(1))
    for other in (uncond[:1], uncond[0]):
        with pytest.raises(ValueError, match=r"cond is \(2, 4, 3, 5\) and uncond"):
            cfg_magnitude(cond, other)


@pytest.mark.parametrize("options", [{}, {"threshold": None}, {"threshold": None, "ratio": 0.7}])
@pytest.mark.parametrize("name", [*PRESETS, "local"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_model_s_tokens_make_pairs_that_hold(name: str, options: dict[str, Any], bad: float) -> None:
    """Each token goes with one that stays: on CUDA an index that is out of bounds would end the host's process."""
    config = preset("default", search="local") if name == "local" else preset(name)
    for share in (0.02, 0.5, 1.0):
        session = MergeSession(config.with_(**options))
        for sigma in (9.0, 1.0):
            x = tokens(2, 7, 9)
            x[torch.rand(2, 63) < share] = bad
            pairing = one(session, x, sigma, size=(7, 9))
            if pairing is not None:
                target, m = pairing.target, pairing.size.shape[1]
                assert torch.equal(target.gather(1, target), target)
                assert pairing.row.min() >= 0
                assert pairing.row.max() < m
                assert pairing.unmerge(pairing.merge(x)).shape == x.shape
            observe(session, torch.rand(1, 7, 9))


@pytest.mark.parametrize("name", ["default", "importance"])
def test_a_map_without_a_single_number_still_merges(name: str) -> None:
    session = MergeSession(preset(name, prune_until=0.0))
    for value in (float("nan"), 0.0):
        one(session, tokens(), 9.0)
        observe(session, torch.full((1, 8, 8), value))
        pairing = one(session, tokens())
        assert session.importance is not None
        assert pairing is not None
        assert torch.isfinite(pairing.merge(tokens())).all()
        session.reset()
    session.stats.to_dict()


@pytest.mark.parametrize("threshold", [None, 0.9])
def test_a_constant_map_changes_nothing(threshold: float | None) -> None:
    """Nor does it make all tokens harder to merge, as one rank for all of them above 0 would."""
    x = tokens()
    config = preset("default", threshold=threshold, floor=0.0, importance=0.5, refresh=Always())
    informed, plain = MergeSession(config), MergeSession(config)
    for session in (informed, plain):
        one(session, x, 2.0)
    observe(informed, torch.full((1, 8, 8), 3.0))
    pairing = one(informed, x)
    assert pairing is not None
    assert same(pairing, one(plain, x))
    observe(informed, torch.rand(1, 8, 8))
    assert differ(one(informed, x, 0.5), pairing)


def test_where_nothing_merges_no_importance_is_computed_and_elsewhere_it_is() -> None:
    session = MergeSession(preset("default", min_tokens=100))
    for h, merges in ((8, False), (16, True), (8, False)):
        coarse = Layer("coarse", 1)
        for sigma in (9.0, 5.0):
            with session.call(ModelCall.chunked(sigma, (h, 8), BOTH, 1)):
                assert (session.merge(LAYER, tokens(h=h)) is not None) == merges
                assert session.merge(coarse, tokens(h=h // 2, w=4)) is None
            session.observe(torch.rand(1, 4, h, 8), torch.rand(1, 4, h, 8))
            assert (session.importance is not None) == merges
        session.reset()
    with session.call(ModelCall.chunked(9.0, SIZE, BOTH, 1)):
        pass  # a model whose layers have not been asked: they may merge
    session.observe(torch.rand(1, 4, 8, 8), torch.rand(1, 4, 8, 8))
    assert session.importance is not None


@pytest.mark.parametrize("name", PRESETS)
def test_without_guidance_and_in_the_first_step_every_preset_merges(name: str) -> None:
    session = MergeSession(preset(name))
    for sigma in (10.0, 5.0, 1.0):
        assert one(session, tokens(1), sigma, ("cond",)) is not None
    assert session.importance is None
    assert session.stats.to_dict()["importance_merged"] is None


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.286])
def test_importance_decides_at_low_ratios_too(ratio: float) -> None:
    x, importance = tokens(), torch.rand(1, 8, 8)
    targets = []
    for seen in (importance, 1 - importance):
        session = MergeSession(preset("default", ratio=ratio, threshold=None))
        one(session, x, 8.0)
        observe(session, seen)
        pairing = one(session, x)
        assert pairing is not None
        assert pairing.size.shape[1] == 64 - int(64 * ratio)
        targets.append(pairing.target)
        share = session.stats.to_dict()["importance_merged"]
        assert share < 0.9 * ratio  # less than chance
    assert not torch.equal(*targets)


@pytest.mark.parametrize("threshold", [None, -1.0, 0.9])
def test_protected_tokens_are_never_merged_away(threshold: float | None) -> None:
    importance = torch.rand(1, 8, 8)
    session = MergeSession(preset("default", threshold=threshold, protect=0.4, ratio=0.75, floor=0.75))
    one(session, tokens(), 8.0)
    observe(session, importance)
    pairing = one(session, tokens())
    assert pairing is not None
    protected = importance.flatten().argsort(descending=True)[:25]
    assert torch.equal(pairing.target[0, protected], protected)
    assert pairing.size.shape[1] < 64


def test_importance_of_another_batch_is_not_used() -> None:
    session = MergeSession(preset("default"))
    one(session, tokens(), 8.0)
    observe(session, torch.rand(3, 8, 8))
    assert one(session, tokens()) is not None
    assert session.stats.to_dict()["steps"][-1]["importance_merged"] is None


# -- batches and branches


@pytest.mark.parametrize(
    "changes", [{}, {"floor": 0.0}, {"share_branches": False}, {"destinations": "pool", "search": "global"}]
)
def test_an_image_is_paired_alike_alone_and_in_a_batch(changes: dict[str, Any]) -> None:
    config = preset("default", **changes)
    rough = torch.tensor([0.02, 0.3, 3.0]).repeat(2)[:, None, None]
    x = tokens(6) + rough * torch.randn(6, 64, 8)
    importance = torch.rand(3, 8, 8)

    def run(rows: list[int], seen: Tensor) -> Pairing:
        session = MergeSession(config)
        one(session, x[rows], 4.0)
        observe(session, seen)
        pairing = one(session, x[rows], 1.0)
        return pairing if pairing is not None else Pairing.from_target(torch.arange(64).repeat(len(rows), 1), 64)

    batch = run([*range(6)], importance)
    y = torch.randn(6, 64, 5)
    for image in range(3):
        rows = [image, 3 + image]
        alone = run(rows, importance[[image]])
        assert torch.equal(alone.target, batch.target[rows])
        assert torch.equal(alone.unmerge(alone.merge(y[rows])), batch.unmerge(batch.merge(y))[rows])


def dst_of(pairing: Pairing, row: int) -> set[int]:
    """Tokens that others were merged into."""
    return set(pairing.head[row][pairing.size[row] > 1].tolist())


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", PRESETS)
def test_both_branches_share_their_destinations(name: str, share: bool) -> None:
    config = preset(name, share_branches=share, ratio=0.75, floor=0.75 if name != "ca_tome" else 0.0, prune_until=0.0)
    session = MergeSession(config.with_(threshold=None, stride=2))
    one(session, tokens(4), 2.0)
    observe(session, torch.rand(2, 8, 8))
    pairing = one(session, tokens(4))
    assert pairing is not None
    for image in range(2):  # with 0.75 gone, what stays is all destinations
        uncond, cond = (set(pairing.target[row].tolist()) for row in (image, 2 + image))
        assert len(cond) == 16
        assert uncond == cond
        assert (torch.equal(pairing.target[image], pairing.target[2 + image])) == share
    if share:
        assert torch.equal(pairing.size[:2], pairing.size[2:])


@pytest.mark.parametrize("name", ["default", "fast", "tomesd", "importance"])
def test_serial_branches_get_what_a_batch_gets(name: str) -> None:
    config = preset(name)
    batched, serial = MergeSession(config), MergeSession(config)
    for sigma in (8.0, 7.0, 2.0, 1.5):
        x = tokens(4)
        whole = one(batched, x, sigma)
        cond = one(serial, x[2:], sigma, ("cond",))
        uncond = one(serial, x[:2], sigma, ("uncond",))
        assert whole is not None
        assert cond is not None
        assert uncond is not None
        assert torch.equal(whole.target, torch.cat([uncond.target, cond.target]))
        seen = torch.rand(2, 8, 8)
        observe(batched, seen)
        observe(serial, seen)
    made = [s.stats.to_dict()["pairings_made"] for s in (batched, serial)]
    assert made[0] == made[1] or name in ("tomesd", "importance")  # those match each branch by itself


def in_parts(session: MergeSession, x: Tensor, sigma: float, *parts: tuple[str, list[int]]) -> list[Pairing | None]:
    """An evaluation of the denoiser in calls of one branch each, of so many images, by the rows of x."""
    found, row = [], 0
    for i, (branch, images) in enumerate(parts):
        rows = slice(row, row := row + len(images))
        with session.call(ModelCall(sigma, SIZE, (branch,) * len(images), tuple(images), further=i > 0)):
            found.append(session.merge(LAYER, x[rows], x[rows]))
    return found


def test_serial_branches_agree_where_drift_decides() -> None:
    session, whole = (MergeSession(preset("default", refresh=Drift(0.1))) for _ in range(2))
    x, other = tokens(), torch.randn(2, 64, 8)
    for step, features in enumerate([x, x, other, other, other]):
        cond, uncond = in_parts(session, features, 10.0 - step, ("cond", [0]), ("uncond", [0]))
        assert same(cond, uncond), step
        assert cond is not None
        batched = one(whole, features.flip(0), 10.0 - step)
        assert batched is not None
        assert torch.equal(batched.target[1:], cond.target), step
    assert session.stats.to_dict()["pairings_made"] == 2


@pytest.mark.parametrize("refresh", [Always(), SigmaRatio(4.0)])
def test_several_conds_one_after_the_other_get_what_a_batch_gets(refresh: Any) -> None:
    shared, own = (MergeSession(preset("default", refresh=refresh, share_branches=s)) for s in (True, False))
    for sigma in (8.0, 7.0, 2.0):
        x = tokens(3)
        parts = ("cond", [0]), ("cond", [0]), ("uncond", [0])
        one_for_all = in_parts(shared, x, sigma, *parts)
        assert same(one_for_all[0], one_for_all[1])
        assert same(one_for_all[0], one_for_all[2])
        each = in_parts(own, x, sigma, *parts)
        if sigma == 8.0 or isinstance(refresh, Always):
            assert all(
                same(p, one(MergeSession(own.config), x[i : i + 1], sigma, ("cond",))) for i, p in enumerate(each)
            )
        assert differ(each[0], each[1])


def test_images_that_a_host_calls_for_by_themselves_have_their_importance() -> None:
    """As AUTOMATIC1111 does with several conds for each of several images."""
    session, x, seen = MergeSession(preset("default", refresh=Always())), tokens(6), torch.rand(2, 8, 8)
    parts = ("cond", [0, 0]), ("cond", [1, 1]), ("uncond", [0, 1])
    in_parts(session, x, 8.0, *parts)
    observe(session, seen)
    found = in_parts(session, x, 7.0, *parts)
    for image in range(2):
        alone = MergeSession(session.config)
        one(alone, x[:1], 8.0, ("cond",))
        observe(alone, seen[image : image + 1])
        pairing, expected = found[image], one(alone, x[2 * image : 2 * image + 1], 7.0, ("cond",))
        assert pairing is not None
        assert expected is not None
        assert torch.equal(pairing.target[:1], expected.target)


def test_an_empty_batch_passes_through() -> None:
    session = MergeSession(preset("default"))
    with session.call(ModelCall(1.0, SIZE, ("cond",), (0,))):
        assert session.merge(LAYER, torch.zeros(0, 64, 8)) is None


def test_serial_branches_share_one_matching_a_step_even_if_pairs_are_always_new() -> None:
    session = MergeSession(preset("default", refresh=Always()))
    for sigma in (8.0, 4.0, 4.0):  # the last one as a second-order sampler's second call
        cond = one(session, tokens(1), sigma, ("cond",))
        assert same(one(session, tokens(1), sigma, ("uncond",)), cond)
    assert session.stats.to_dict()["pairings_made"] == 3


def test_new_pairs_use_the_latest_importance() -> None:
    x, maps = tokens(), torch.rand(3, 1, 8, 8)
    session = MergeSession(preset("default", refresh=Always()))
    one(session, x, 9.0)
    for sigma, seen in zip((8.0, 7.0, 6.0), maps, strict=True):
        observe(session, seen)
        fresh = MergeSession(preset("default"))
        one(fresh, x, 90.0)
        observe(fresh, seen)
        assert same(one(session, x, sigma), one(fresh, x, 6.0))


def test_a_new_batch_layout_never_sees_old_pairs() -> None:
    session = MergeSession(preset("default", refresh=Once()))
    one(session, tokens(2), 4.0)
    for b, branches in ((4, BOTH), (3, ("cond",)), (8, BOTH)):
        x = tokens(b)
        pairing = one(session, x, 4.0, branches)
        assert pairing is not None
        assert pairing.row.shape == (b, 64)
        fresh = one(MergeSession(preset("default", refresh=Once())), x, 4.0, branches)
        assert same(pairing, fresh)


def test_a_new_latent_size_forgets() -> None:
    session = MergeSession(preset("default", refresh=Once()))
    x = tokens(2)
    first = one(session, x, 4.0)
    observe(session, torch.rand(1, 8, 8))
    wide = one(session, x, 4.0, size=(4, 16))  # as many tokens, another picture
    assert session.importance is None
    assert same(wide, one(MergeSession(preset("default")), x, 4.0, size=(4, 16)))
    assert differ(wide, first)
    assert one(session, x, 4.0, size=(7, 9)) is None
    assert "64 tokens are not the grid of a (7, 9) latent: passed through" in session.stats.notes


@pytest.mark.parametrize(("branches", "images"), [(("cond",), (0, 1)), (("left",), (0,))])
def test_a_call_that_does_not_add_up_is_refused(branches: tuple[str, ...], images: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="branch"):
        ModelCall(1.0, SIZE, branches, images)


# -- randomness


@pytest.mark.parametrize("name", PRESETS)
def test_no_global_generator_is_touched_or_heeded(name: str) -> None:
    x, importance = tokens(), torch.rand(1, 8, 8)
    pairings = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        session = MergeSession(preset(name))
        for sigma in (4.0, 1.0):
            pairings.append(one(session, x, sigma))
            observe(session, importance)
        assert torch.equal(state[0], torch.get_rng_state())
        assert state[1] == random.getstate()
        assert (state[2] == np.random.get_state()[1]).all()
    assert same(pairings[0], pairings[2])
    assert same(pairings[1], pairings[3])


@pytest.mark.parametrize("name", ["tomesd", "ca_tome", "importance"])
def test_a_seed_a_block_and_a_noise_level_each_draw_their_own(name: str) -> None:
    x = tokens()

    def drawn(seed: int = 0, block: int = 0, sigma: float = 1.0) -> Pairing | None:
        return one(MergeSession(preset(name, seed=seed)), x, sigma, layer=Layer("x", block))

    assert same(drawn(), drawn())
    assert differ(drawn(), drawn(seed=1))
    assert differ(drawn(), drawn(block=1))
    assert differ(drawn(), drawn(sigma=2.0))


# -- when


def test_start_and_end_are_fractions_of_the_run() -> None:
    sigmas = torch.logspace(1, -1, 10).tolist()
    for start, end, steps in ((0.0, 1.0, range(10)), (0.2, 0.7, range(2, 7)), (0.5, 0.5, ()), (1.0, 1.0, ())):
        session = MergeSession(preset("default", start=start, end=end), [*sigmas, 0.0])
        merged = [one(session, tokens(), sigma) is not None for sigma in sigmas]
        assert [i for i, m in enumerate(merged) if m] == list(steps)


@pytest.mark.parametrize(("early_ratio", "left"), [(0.75, 16), (0.9, 64 - 57), (0.3, 64 - 19), (0.0, 64), (None, 32)])
def test_the_early_part_of_a_run_merges_its_own_share_of_the_tokens(early_ratio: float | None, left: int) -> None:
    config = preset("default", threshold=None, early_ratio=early_ratio, early_sigma=2.0, refresh=Once())
    session, lengths = MergeSession(config), []
    for sigma in (9.0, 2.1, 2.0, 0.1):
        pairing = one(session, tokens(), sigma)
        lengths.append(64 if pairing is None else pairing.size.shape[1])
    assert lengths == [left, left, 32, 32]
    # once in each part, whatever the policy
    assert session.stats.to_dict()["pairings_made"] == (2 if early_ratio else 1)
    assert one(MergeSession(config), tokens(), None).size.shape[1] == 32  # type: ignore[union-attr]
    assert one(MergeSession(config.with_(ratio=0.0)), tokens(), 9.0) is None
    session.reset()
    assert session.fixed_length(64, SIZE) == 32
    with session.call(ModelCall.chunked(9.0, SIZE, BOTH, 1)):
        assert session.fixed_length(64, SIZE) == (left if early_ratio else None if early_ratio == 0 else 32)


def test_an_unknown_sigma_reuses_nothing() -> None:
    session = MergeSession(preset("default", refresh=Once()))
    for _ in range(3):
        assert one(session, tokens(), None) is not None
    assert session.stats.to_dict()["pairings_made"] == 3


def test_small_layers_are_left_alone() -> None:
    for least, merged in ((64, True), (65, False)):
        assert (one(MergeSession(preset("default", min_tokens=least)), tokens()) is not None) == merged


def test_drift_refreshes_when_the_features_change_and_not_before() -> None:
    session = MergeSession(preset("default", refresh=Drift(0.1)))
    x, other = tokens(), torch.randn(2, 64, 8)
    made = []
    for step, features in enumerate([x, x, 2 * x, other, other, other, x]):
        one(session, features, 10.0 - step)
        made.append(session.stats.to_dict()["steps"][-1]["pairings_made"])
    assert made == [1, 0, 0, 0, 1, 0, 0]  # measured at one call, made anew at the next


def test_modules_of_a_block_share_its_pairs_and_blocks_share_those_of_a_level_if_told_to() -> None:
    x = tokens()
    for share, made in ((False, 2), (True, 1)):
        session = MergeSession(preset("default", share_layers=share))
        with session.call(ModelCall.chunked(1.0, SIZE, BOTH, 1)):
            pairings = [session.merge(Layer(str(i), i // 2), x) for i in range(4)]
        assert pairings[0] is pairings[1] or same(pairings[0], pairings[1])
        stats = session.stats.to_dict()
        assert (stats["pairings_made"], stats["pairings_reused"]) == (made, 4 - made)


def test_what_is_forgotten_at_a_reset() -> None:
    session = MergeSession(preset("default"))
    one(session, tokens(), 1.0)
    observe(session, torch.rand(1, 8, 8))
    assert len(session.pairings()) == 1
    session.reset()
    assert session.importance is None
    assert session.pairings() == {}
    assert session.stats.to_dict()["tokens_before"] == 0


# -- statistics


def test_statistics_add_up() -> None:
    session = MergeSession(preset("default", threshold=None, ratio=0.5, early_ratio=None, refresh=SigmaRatio(2.0)))
    for sigma in (4.0, 3.0, 2.0):
        with session.call(ModelCall.chunked(sigma, SIZE, BOTH, 1)):
            for block in range(3):
                session.merge(Layer(f"block{block}", block), tokens())
        observe(session, torch.rand(1, 8, 8))
    stats = session.stats.to_dict()
    assert set(stats) == {
        *("tokens_before", "tokens_after", "merged_fraction", "pairings_made", "pairings_reused"),
        *("mean_similarity", "importance_merged", "layers", "steps", "notes", "cache_bytes"),
        *("seconds_matching", "seconds_merging"),
    }
    assert stats["tokens_before"] == 3 * 3 * 2 * 64
    assert stats["tokens_after"] == stats["tokens_before"] // 2
    assert stats["merged_fraction"] == 0.5
    assert (stats["pairings_made"], stats["pairings_reused"]) == (6, 3)
    assert [step["sigma"] for step in stats["steps"]] == [4.0, 3.0, 2.0]
    for parts in (stats["layers"].values(), stats["steps"]):
        for name in ("tokens_before", "tokens_after", "pairings_made", "pairings_reused"):
            assert sum(part[name] for part in parts) == stats[name]
    assert 0 < stats["mean_similarity"] <= 1
    assert 0 < stats["importance_merged"] < 0.5
    assert stats["notes"] == []


def test_mean_similarity_and_importance_merged_are_what_they_say() -> None:
    session, x, importance = MergeSession(preset("default")), tokens(), torch.rand(1, 8, 8)
    one(session, x, 8.0)
    observe(session, importance)
    pairing = one(session, x, 1.0)
    assert pairing is not None
    target, own = pairing.target[1], torch.arange(64)  # the cond row speaks
    gone = target != own
    cosine = nn.functional.cosine_similarity(x[1][gone], x[1][target[gone]], dim=-1).mean()
    step = session.stats.to_dict()["steps"][1]
    assert step["mean_similarity"] == pytest.approx(float(cosine), abs=1e-5)
    share = importance.flatten()[gone].sum() / importance.sum()
    assert step["importance_merged"] == pytest.approx(float(share), abs=1e-5)


@pytest.mark.parametrize("refresh", [Always(), SigmaRatio(2.0), Drift(0.0)])
def test_what_is_kept_is_weighed_and_does_not_grow_with_the_run(refresh: Any) -> None:
    def weighed(calls: int) -> tuple[int, int]:
        session = MergeSession(preset("default", threshold=None, refresh=refresh))
        for step in range(calls):
            with session.call(ModelCall.chunked(8.0 * 0.9**step, SIZE, BOTH, 1)):
                for block in range(3):
                    pairing = session.merge(Layer(f"block{block}", block), tokens())
                    assert pairing is not None
                    pairing.unmerge(pairing.merge(tokens()))
            observe(session, torch.rand(1, 8, 8))
        storages = {t.data_ptr(): t.nbytes for p in session.pairings().values() for t in (p.row, p.size, p.head)}
        session.release()
        assert not session.pairings()
        return session.stats.to_dict()["cache_bytes"], sum(storages.values())

    (once, least), (often, _) = weighed(1), weighed(40)
    assert least < once
    assert once <= often <= 1.5 * once  # the later part of a run keeps longer sequences than the early one
    assert often < 3 * (64 * 64 + 2 * 256 * 8)  # 64 bytes for each token of three layers, and what drift is measured on


# -- levels and modules of a real U-Net


def call_unet(unet: nn.Module, size: tuple[int, int] = (16, 16)) -> Tensor:
    with torch.no_grad():
        return unet(torch.randn(2, 4, *size), 500, encoder_hidden_states=torch.randn(2, 3, 8), return_dict=False)[0]


@pytest.mark.parametrize(("levels", "sizes"), [(1, {256}), (2, {256, 64})])
def test_levels_count_from_the_finest_one_with_attention(unet: nn.Module, levels: int, sizes: set[int]) -> None:
    with merging(unet, preset("default", levels=levels)) as session:
        call_unet(unet)
    assert {layer["tokens_before"] // 2 for layer in session.stats.to_dict()["layers"].values()} == sizes
    assert all(layer["tokens_after"] < layer["tokens_before"] for layer in session.stats.to_dict()["layers"].values())


def test_a_unet_whose_finest_level_has_no_attention_is_merged_at_the_next(coarse_unet: nn.Module) -> None:
    with merging(coarse_unet, preset("default")) as session:
        call_unet(coarse_unet)
    assert {layer["tokens_before"] // 2 for layer in session.stats.to_dict()["layers"].values()} == {64}
    assert session.stats.to_dict()["merged_fraction"] > 0


@pytest.mark.parametrize("modules", [("attn1",), ("attn2",), ("ff",), ("attn1", "attn2", "ff")])
@pytest.mark.parametrize("size", [(16, 16), (10, 14), (12, 6)])
def test_each_module_runs_on_merged_tokens(unet: nn.Module, modules: tuple[str, ...], size: tuple[int, int]) -> None:
    with merging(unet, preset("default", modules=modules), branches=BOTH) as session:
        assert torch.isfinite(call_unet(unet, size)).all()
    assert {name.rsplit(".", 1)[1] for name in session.stats.to_dict()["layers"]} == set(modules)
    assert session.stats.to_dict()["merged_fraction"] >= 0.19
    blocks = len(session.stats.to_dict()["layers"]) // len(modules)
    assert session.stats.to_dict()["pairings_made"] == blocks


# -- another picture where the last one began


@pytest.mark.parametrize("refresh", [SigmaRatio(4.0), Once()])
def test_a_run_of_one_step_gets_pairs_of_its_own(refresh: Any) -> None:
    session = MergeSession(preset("default", threshold=None, refresh=refresh), [8.0])
    first, second = tokens(), tokens()
    one(session, first, 8.0)
    found = one(session, second, 8.0)
    alone = MergeSession(session.config, [8.0])
    assert same(found, one(alone, second, 8.0))


def test_only_where_a_run_begins_is_the_same_noise_level_another_picture() -> None:
    session = MergeSession(preset("default", threshold=None))
    made = []
    for sigma in (8.0, 7.0, 7.0, 6.0):  # Heun's second evaluation is the next step's first one
        one(session, tokens(), sigma)
        made.append(sum(layer.pairings_made for layer in session.stats.calls[-1].layers.values()))
    assert made == [1, 0, 0, 0]


def test_both_branches_of_a_first_step_in_calls_of_their_own_share_pairs() -> None:
    session = MergeSession(preset("default", threshold=None))
    x = tokens()
    pairs = [one(session, x[:1], 8.0, branches=(branch,)) for branch in BOTH]
    assert same(*pairs)
    assert sum(call.layers[LAYER.name].pairings_made for call in session.stats.calls) == 1


def test_destinations_are_of_the_part_that_a_call_is_merged_as() -> None:
    config = preset("fast", threshold=None, ratio=0.5, stride=2, early_ratio=0.9)
    session, x = MergeSession(config), tokens()
    with session.call(ModelCall.chunked(1.0, SIZE, BOTH, 1)):
        lengths = []
        for number, early in enumerate((False, True)):
            session.merge_as(early)
            pairing = session.merge(Layer(f"x{number}", number), x, x)
            assert pairing is not None
            lengths.append(pairing.size.shape[1])
    assert lengths == [32, 64 - int(64 * 0.9)]


# -- waiting for the device


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("name", ["default", "tomesd", "importance"])
def test_no_layer_waits_for_the_device_with_a_fixed_ratio(
    name: str, guided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = MergeSession(preset(name, threshold=None, proportional=True, refresh=SigmaRatio(1.5)))
    x = tokens(4)
    one(session, x, 8.0)
    if guided:
        observe(session, torch.rand(2, 8, 8))
    one(session, x, 4.0)

    def refuse(what: str) -> Callable[..., Any]:
        def refused(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError(f"{what} waits for the device, or copies to it")

        return refused

    for sigma in (3.9, 2.0):  # cached pairs, then new ones
        with session.call(ModelCall.chunked(sigma, SIZE, BOTH, 2)), monkeypatch.context() as patch:
            for method in (
                "item",
                "tolist",
                "cpu",
                "numpy",
                "__bool__",
                "__int__",
                "__float__",
                "__index__",
                "nonzero",
            ):
                patch.setattr(Tensor, method, refuse(method))
            for function in ("tensor", "as_tensor", "from_numpy", "nonzero"):
                patch.setattr(torch, function, refuse(function))
            patch.setattr(Tensor, "new_tensor", refuse("new_tensor"))
            pairing = session.merge(LAYER, x)
            assert pairing is not None
            merged = pairing.merge(x)
            pairing.unmerge(merged)
            shape, sizes = merged.shape, pairing.log_size.values
        early = session.config.early if sigma > session.config.early_sigma else None
        assert shape[1] == 64 - int(64 * (early or session.config).ratio)
        assert sizes.shape == shape[:2]
