"""When is a cached pairing due again. Time is sigma: second-order, adaptive and restarting samplers call the model
more than once a step, at sigmas of their own choice, and may go back up."""

from __future__ import annotations

import bisect
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, ClassVar


@dataclass(frozen=True)
class Moment:
    """A model call's place in the run.

    sigma: noise level, > 0. fraction: how much of the run lies before it, 0 .. 1. step: the sampler's step, from 0.
    """

    sigma: float
    fraction: float
    step: int


class Schedule:
    """The sigmas of a run, and where in it a sigma lies.

    Between two of them, where samplers with several calls a step evaluate too, the logarithm of sigma is followed.

    Args:
        sigmas: falling noise levels, one a step; a last 0, which samplers end with, is ignored.
    """

    def __init__(self, sigmas: Sequence[float]) -> None:
        levels = [float(s) for s in sigmas if float(s) > 0]
        if not levels or any(not math.isfinite(s) for s in levels) or any(b > a for a, b in itertools.pairwise(levels)):
            raise ValueError(f"sigmas are {list(sigmas)[:4]}...; they must fall, be finite, and one must be above 0")
        self._falling = [-math.log(s) for s in levels]

    def __len__(self) -> int:
        return len(self._falling)

    def moment(self, sigma: float) -> Moment:
        """The moment of a sigma; before the first and after the last one it is the run's start or last step."""
        if not math.isfinite(sigma) or sigma <= 0:
            raise ValueError(f"sigma is {sigma!r}; it must be a finite number above 0")
        now, levels = -math.log(sigma) + 1e-6, self._falling
        step = max(bisect.bisect_right(levels, now) - 1, 0)
        position = float(step)
        if step + 1 < len(levels) and now > levels[step]:
            position += (now - levels[step]) / (levels[step + 1] - levels[step])
        return Moment(sigma, position / len(levels), step)


@dataclass(frozen=True)
class Refresh(ABC):
    """A policy. The session also makes pairs anew, whatever the policy says, when sigma has gone back up."""

    kind: ClassVar[str]
    measures_drift: ClassVar[bool] = False

    @abstractmethod
    def due(self, made_at: Moment, now: Moment, drift: float) -> bool:
        """Whether pairs made at `made_at` are to be made anew; `drift` is how much similarity they lost since."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data; :func:`refresh_from_dict` gives an equal policy back."""
        data = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"kind": self.kind, **data}


@dataclass(frozen=True)
class Always(Refresh):
    """New pairs at each model call, as ToMe-SD and importance-based merging do."""

    kind: ClassVar[str] = "always"

    def due(self, made_at: Moment, now: Moment, drift: float) -> bool:
        del made_at, now, drift
        return True


@dataclass(frozen=True)
class Once(Refresh):
    """The run's first pairs to its end."""

    kind: ClassVar[str] = "once"

    def due(self, made_at: Moment, now: Moment, drift: float) -> bool:
        del made_at, now, drift
        return False


@dataclass(frozen=True)
class SigmaRatio(Refresh):
    """New pairs when sigma has fallen by the factor `ratio` (> 1) since they were made: the same number of matchings
    for first- and second-order samplers alike."""

    kind: ClassVar[str] = "sigma_ratio"
    ratio: float = 2.0

    def __post_init__(self) -> None:
        if not (isinstance(self.ratio, (int, float)) and math.isfinite(self.ratio) and self.ratio > 1):
            raise ValueError(f"ratio of SigmaRatio is {self.ratio!r}; it must be a finite number above 1")

    def due(self, made_at: Moment, now: Moment, drift: float) -> bool:
        del drift
        return made_at.sigma >= now.sigma * self.ratio * (1 - 1e-6)


@dataclass(frozen=True)
class EverySteps(Refresh):
    """New pairs every `steps` (>= 1) sampler steps."""

    kind: ClassVar[str] = "every_steps"
    steps: int = 5

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"steps of EverySteps is {self.steps!r}; it must be a whole number of at least 1")

    def due(self, made_at: Moment, now: Moment, drift: float) -> bool:
        del drift
        return now.step - made_at.step >= self.steps


@dataclass(frozen=True)
class Checkpoints(Refresh):
    """New pairs at the given fractions of the run, 0 .. 1 (CA-ToMe's lists, see :data:`CA_TOME_CHECKPOINTS`)."""

    kind: ClassVar[str] = "checkpoints"
    fractions: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "fractions", tuple(self.fractions))
        for fraction in self.fractions:
            if not (isinstance(fraction, (int, float)) and 0 <= fraction <= 1):
                raise ValueError(f"fractions of Checkpoints holds {fraction!r}; each must be a number from 0 to 1")

    def due(self, made_at: Moment, now: Moment, drift: float) -> bool:
        del drift
        return any(made_at.fraction + 1e-6 < fraction <= now.fraction + 1e-6 for fraction in self.fractions)


@dataclass(frozen=True)
class Drift(Refresh):
    """New pairs when the cached ones have come apart: their mean similarity, measured on a sample at each reuse, has
    fallen by `tolerance` (0 .. 2) below what it was when they were made.

    The measurement is read at the start of the next model call, so that no layer waits for the device. It is the mean
    of a batch, whose images get new pairs together: with this policy alone a picture depends on those beside it.
    """

    kind: ClassVar[str] = "drift"
    measures_drift: ClassVar[bool] = True
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        if not (isinstance(self.tolerance, (int, float)) and 0 <= self.tolerance <= 2):
            raise ValueError(f"tolerance of Drift is {self.tolerance!r}; it must be a number from 0 to 2")

    def due(self, made_at: Moment, now: Moment, drift: float) -> bool:
        del made_at, now
        return drift > self.tolerance


_POLICIES: dict[str, type[Refresh]] = {p.kind: p for p in (Always, Once, SigmaRatio, EverySteps, Checkpoints, Drift)}


def refresh_from_dict(data: Mapping[str, Any]) -> Refresh:
    """The policy that :meth:`Refresh.to_dict` wrote.

    Raises:
        ValueError: its kind or an argument is unknown.
    """
    arguments = dict(data)
    kind = arguments.pop("kind", None)
    if not isinstance(kind, str) or kind not in _POLICIES:
        raise ValueError(f"refresh kind is {kind!r}; it must be one of {', '.join(_POLICIES)}")
    try:
        return _POLICIES[kind](**arguments)
    except TypeError as error:
        raise ValueError(f"refresh {kind!r} does not take {', '.join(arguments) or 'no arguments'}: {error}") from None


def _of_fifty(*steps: int) -> Checkpoints:
    """CA-ToMe counts a 50-step run's calls from 1, so its 0 never occurs and step s is the fraction (s - 1) / 50."""
    return Checkpoints(tuple((step - 1) / 50 for step in steps if step >= 1))


CA_TOME_CHECKPOINTS: dict[str, Checkpoints] = {
    "config_1": _of_fifty(0, 1, 2, 3, 5, 10, 15, 25, 35),
    "config_2": _of_fifty(0, 10, 11, 12, 15, 20, 25, 30, 35, 45),
    "config_3": _of_fifty(0, 8, 11, 13, 20, 25, 30, 35, 45, 46, 47, 48, 49),
    "config_4": _of_fifty(0, 9, 13, 14, 15, 28, 29, 32, 36, 45),
    "adaptive": _of_fifty(0, 1, 5, 7, 10, 12, 15, 35, 40, 45, 46, 47, 48, 49, 50, 51),
    "config_5": _of_fifty(0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50),
}
"""CA-ToMe's published checkpoint lists (Saghatchian et al. 2025), made for 50 steps, as fractions of the run."""


class Clock:
    """Turns the sigmas that model calls arrive with into moments of the run.

    Args:
        sigmas: the schedule that the sampler was given, if known: then fractions and steps are exact.
        table: all noise levels of the model, if known: fractions are places in it, as ComfyUI's percents are.
        restarts: the sampler may go back to its first sigma, so that this is not taken for a second run.

    With neither, the run is taken to fall geometrically from its first sigma to 0.03. Without `sigmas`, a step is a
    model call at a new lowest sigma.
    """

    def __init__(
        self, sigmas: Sequence[float] | None = None, table: Sequence[float] | None = None, restarts: bool = False
    ) -> None:
        self._restarts = restarts
        self._schedule = Schedule(sigmas) if sigmas is not None else None
        self._table = Schedule(table) if table is not None else None
        self._first = self._lowest = math.nan
        self._step = -1

    def moment(self, sigma: float) -> Moment:
        """The moment of the model call that arrives now, at `sigma`.

        Raises:
            ValueError: sigma is not a finite number above 0.
            RuntimeError: more than half of a run had passed, and sigma is back at its start: a second run.
        """
        if not isinstance(sigma, (int, float)) or not math.isfinite(sigma) or sigma <= 0:
            raise ValueError(f"sigma is {sigma!r}; it must be a finite number above 0")
        if self._step < 0:
            self._first = sigma
        if self._step < 0 or sigma < self._lowest * (1 - 1e-4):
            self._lowest, self._step = sigma, self._step + 1
        elif not self._restarts and sigma >= self._first * (1 - 1e-4) and self._fraction(self._lowest) > 0.5:
            raise RuntimeError(
                f"this session has already sampled a run (sigma fell from {self._first:.4g} to {self._lowest:.4g} and "
                f"is {sigma:.4g} again); call session.reset() between runs, or open a session for each"
            )
        if self._schedule is not None:
            return self._schedule.moment(sigma)
        return Moment(sigma, self._fraction(sigma), self._step)

    def _fraction(self, sigma: float) -> float:
        known = self._schedule or self._table
        if known is not None:
            return known.moment(sigma).fraction
        span = math.log(max(self._first / 0.03, 1 + 1e-6))
        return min(max(math.log(self._first / sigma) / span, 0.0), 1.0)


@lru_cache(maxsize=64)
def calls_served(policy: Refresh) -> float:
    """How many model calls a match serves, in a run of 20 steps over Stable Diffusion's noise levels, spaced as
    Karras et al. (2022) do. Where drift decides 1, as it may be each."""
    if policy.measures_drift:
        return 1.0
    steps = 20
    top, low = 14.6 ** (1 / 7), 0.03 ** (1 / 7)
    sigmas = [(top + (low - top) * step / (steps - 1)) ** 7 for step in range(steps)]
    clock, made, matches = Clock(sigmas), None, 0
    for now in map(clock.moment, sigmas):
        if made is None or policy.due(made, now, 0.0):
            made, matches = now, matches + 1
    return steps / matches
