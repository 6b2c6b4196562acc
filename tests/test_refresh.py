from __future__ import annotations

import math

import pytest
import torch

from tome_sampler import Layer, MergeConfig, MergeSession, ModelCall
from tome_sampler.refresh import (
    CA_TOME_CHECKPOINTS,
    Always,
    Checkpoints,
    Clock,
    Drift,
    EverySteps,
    Moment,
    Once,
    Refresh,
    Schedule,
    SigmaRatio,
)


def karras(steps: int, high: float = 14.6, low: float = 0.03) -> list[float]:
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))).pow(7).tolist()


def steps_made(policy: Refresh, sigmas: list[float]) -> list[int]:
    """The calls, from 0, at which a session that gets them at `sigmas` makes new pairs."""
    schedule = [*sorted(sigmas, reverse=True), 0.0]
    session = MergeSession(MergeConfig(refresh=policy, min_tokens=0, threshold=None, early_ratio=None), schedule)
    made = []
    for step, sigma in enumerate(sigmas):
        with session.call(ModelCall(sigma, (4, 4), ("cond",), (0,))):
            session.merge(Layer("x", 0), torch.randn(1, 16, 4))
        if session.stats.to_dict()["steps"][-1]["pairings_made"]:
            made.append(step)
    return made


def test_a_schedule_gives_each_of_its_sigmas_its_step_and_fraction() -> None:
    sigmas = karras(20)
    schedule = Schedule([*sigmas, 0.0])
    assert len(schedule) == 20
    for step, sigma in enumerate(sigmas):
        moment = schedule.moment(sigma)
        assert moment.step == step
        assert moment.fraction == pytest.approx(step / 20, abs=1e-4)


def test_between_two_sigmas_time_follows_the_logarithm() -> None:
    moment = Schedule([8.0, 2.0, 0.5]).moment(4.0)
    assert moment.step == 0
    assert moment.fraction == pytest.approx(0.5 / 3, abs=1e-5)
    assert Schedule([8.0, 2.0]).moment(100.0).fraction == 0
    assert Schedule([8.0, 2.0]).moment(0.01) == Moment(0.01, 0.5, 1)


@pytest.mark.parametrize("sigmas", [[], [0.0], [1.0, 2.0], [math.nan], [math.inf, 1.0], [1.0, -1.0, 2.0]])
def test_a_schedule_that_does_not_fall_is_refused(sigmas: list[float]) -> None:
    with pytest.raises(ValueError, match="sigmas are"):
        Schedule(sigmas)


def test_a_clock_without_a_schedule_counts_new_lowest_sigmas_as_steps() -> None:
    clock = Clock()
    moments = [clock.moment(s) for s in (10.0, 5.0, 5.0, 7.0, 2.5)]  # a second-order sampler goes back up a little
    assert [m.step for m in moments] == [0, 1, 1, 1, 2]
    assert moments[0].fraction == 0
    assert moments[3].fraction < moments[2].fraction < moments[4].fraction < 1
    assert clock.moment(0.001).fraction == 1


def test_a_clock_with_the_models_table_takes_fractions_from_it() -> None:
    table = karras(1000)
    moment = Clock(table=table).moment(table[250])
    assert moment.fraction == pytest.approx(0.25, abs=2e-3)
    assert moment.step == 0


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_a_sigma_that_is_not_above_0_is_refused(sigma: float) -> None:
    for clock in (Clock(), Clock([2.0, 1.0])):
        with pytest.raises(ValueError, match="sigma is"):
            clock.moment(sigma)


@pytest.mark.parametrize("sigmas", [None, karras(20)])
def test_a_second_run_without_reset_is_an_error_and_a_restart_within_one_is_not(sigmas: list[float] | None) -> None:
    session = MergeSession(MergeConfig(), sigmas)

    def run(levels: list[float]) -> None:
        for sigma in levels:
            with session.call(ModelCall(sigma, (4, 4), ("cond",), (0,))):
                pass

    run(karras(20))
    run([5.0])  # Restart goes up, but not to the start
    with pytest.raises(RuntimeError, match=r"already sampled a run.*reset\(\)"):
        run(karras(20))
    session.reset()
    run(karras(20))


def test_always_and_once() -> None:
    assert steps_made(Always(), karras(6)) == [0, 1, 2, 3, 4, 5]
    assert steps_made(Once(), karras(6)) == [0]


def test_every_so_many_steps() -> None:
    assert steps_made(EverySteps(3), karras(10)) == [0, 3, 6, 9]


def test_sigma_ratio_is_due_when_sigma_has_fallen_by_it() -> None:
    assert steps_made(SigmaRatio(2.0), [16.0, 9.0, 8.0, 4.1, 4.0, 1.0, 0.9]) == [0, 2, 4, 5]


def test_checkpoints_are_passed_once_each() -> None:
    assert steps_made(Checkpoints((0.0, 0.3, 0.31, 0.99)), karras(10)) == [0, 3, 4]
    # two calls a step; the second one where a run begins may be another picture's
    assert steps_made(Checkpoints((0.5,)), [s for s in karras(10) for _ in range(2)]) == [0, 1, 10]
    assert steps_made(Checkpoints(()), karras(10)) == [0]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("config_1", [1, 2, 3, 5, 10, 15, 25, 35]),
        ("config_2", [10, 11, 12, 15, 20, 25, 30, 35, 45]),
        ("config_3", [8, 11, 13, 20, 25, 30, 35, 45, 46, 47, 48, 49]),
        ("config_4", [9, 13, 14, 15, 28, 29, 32, 36, 45]),
        ("adaptive", [1, 5, 7, 10, 12, 15, 35, 40, 45, 46, 47, 48, 49, 50]),
        ("config_5", [5, 10, 15, 20, 25, 30, 35, 40, 45, 50]),
    ],
)
def test_published_checkpoints_in_50_steps_and_in_20(name: str, steps: list[int]) -> None:
    # published lists count from 1 and the first call always computes
    assert steps_made(CA_TOME_CHECKPOINTS[name], karras(50)) == sorted({0, *(s - 1 for s in steps)})
    scaled = {math.ceil((s - 1) / 50 * 20 - 1e-6) for s in steps if (s - 1) / 50 <= 19 / 20}
    assert steps_made(CA_TOME_CHECKPOINTS[name], karras(20)) == sorted({0, *scaled})


def test_drift_is_due_above_its_tolerance() -> None:
    now = Moment(1.0, 0.5, 5)
    assert not Drift(0.1).due(now, now, 0.1)
    assert Drift(0.1).due(now, now, 0.11)


@pytest.mark.parametrize("policy", [Once(), SigmaRatio(100.0), EverySteps(100), Checkpoints(()), Drift(2.0)])
def test_sigma_going_back_up_is_due_whatever_the_policy(policy: Refresh) -> None:
    assert steps_made(policy, [5.0, 7.0, 6.0, 5.5, 1.0, 0.5, 0.2, 0.1]) == [0, 1]
