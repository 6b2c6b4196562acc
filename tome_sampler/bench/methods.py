"""What is measured: a way to run the model, put on for a turn and taken off again, its state kept between turns."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import NoReturn

import torch
from torch import Tensor

from tome_sampler.bench.host import Host
from tome_sampler.config import MergeConfig
from tome_sampler.hosts.modules import attach
from tome_sampler.session import Layer, MergeSession, ModelCall
from tome_sampler.stats import LayerStats

USUAL_STEPS = 20
"""The run that single steps are taken from."""
LENGTHS = (USUAL_STEPS, 50)
"""Of the runs that single steps are put together to."""
PLAIN = "plain"
"""The phase of a step in which a method leaves the model as it is."""
_PLACE = int(2 / 5 * USUAL_STEPS)  # the step of this run at whose noise level single steps are measured

Inputs = tuple[Tensor, Tensor]


def part_of(phase: str) -> str:
    """The part of a run that a phase belongs to: "early", "later", or :data:`PLAIN`."""
    return PLAIN if phase == PLAIN else "early" if phase.startswith("early") else "later"


def makes_pairs(phase: str) -> bool:
    """Whether a step of this phase makes pairs, and does not use older ones. Without phases it makes them."""
    return phase != PLAIN and not phase.endswith("reuse")


class Method:
    """The model as it is: `plain`, and what the other methods differ from.

    Attributes:
        phases: what a single step of it can be; "refresh" makes pairs, "reuse" uses those of the step before. Where
            the early part of a run is merged otherwise, "early refresh" and "early reuse" are the steps in it. Empty:
            it is measured in whole runs only.
        merges: whether layers get shorter sequences, so that there is a zero_overhead for it.
        foreign: whether its code is not ours, so that it may fail.
        varies: whether the lengths depend on what the model sees.
    """

    phases: tuple[str, ...] = ("",)
    merges: bool = False
    foreign: bool = False
    varies: bool = False

    def __init__(self, name: str, host: Host) -> None:
        self.name, self.host = name, host

    def on(self) -> AbstractContextManager[None]:
        """Within it, the method is at work on the model."""
        return nullcontext()

    def begin(self, phase: str, sigma: float) -> None:
        """The next call is a single step of this phase, at this noise level."""

    def restart(self, sigmas: list[float]) -> None:
        """A new run begins."""

    def call(self, inputs: Inputs, sigma: float, step: int) -> Tensor:
        """The model's output: what is timed. `step` counts from 0 in a run."""
        del sigma, step
        return self.host(inputs)

    def phases_in(self, sigmas: list[float]) -> list[str]:
        """The phase of each step of a run, or :data:`PLAIN`."""
        return [""] * len(sigmas)

    def place(self, phase: str) -> int:
        """The step of a run of :data:`USUAL_STEPS` at whose noise level this phase is measured: the same for all
        methods, or the nearest one in the phase's part of the run."""
        phases = self.phases_in(self.host.sigmas(USUAL_STEPS))
        steps = [step for step, at in enumerate(phases) if part_of(at) == part_of(phase)]
        return min(steps, key=lambda step: abs(step - _PLACE), default=_PLACE)

    def label(self, phase: str) -> str:
        """What a single step of a phase is called."""
        return f"{self.name}/{phase}" if phase else self.name

    def kinds_in_run(self) -> list[str]:
        """Of each step of the run that has ended: "refresh", "reuse" or :data:`PLAIN`. Empty: it does not merge, or
        nobody knows."""
        return []

    def release(self) -> None:
        """Let go of all tensors."""


class KeptSession(MergeSession):
    """A session that keeps its pairs when it is taken off the model between turns, and of which there are many: what
    it passes through is told in the table, once."""

    def begin_before(self, call: ModelCall) -> None:
        """A call like this one, just before it: the latent's size is known, and calls at this noise level are amid a
        run, as a session takes each one at its first noise level for another picture's."""
        assert call.sigma is not None
        with self.call(replace(call, sigma=call.sigma * 1.01)):
            pass

    def release(self) -> None:
        pass

    def note(self, message: str) -> None:
        if message not in self.stats.notes:
            self.stats.notes.append(message)


def raise_(error: Exception) -> NoReturn:
    """An error of ours while measuring is one."""
    raise error


class Merged(Method):
    """The model with our merging. What a session is told in a step, and importance for the next one, is timed too."""

    merges = True

    def __init__(self, name: str, host: Host, config: MergeConfig) -> None:
        super().__init__(name, host)
        self.config = config
        self.varies = config.threshold is not None
        phases = dict.fromkeys(phase for length in LENGTHS for phase in self.phases_in(host.sigmas(length)))
        self.phases = tuple(phase for phase in phases if phase != PLAIN) or ("refresh",)
        self.release()

    @contextmanager
    def on(self) -> Iterator[None]:
        # the session is told of each call below
        detach = attach(self.host.model, self._session, lambda *_: None, raise_)
        try:
            yield
        finally:
            detach()

    def begin(self, phase: str, sigma: float) -> None:
        part = part_of(phase)  # each has pairs of its own, whichever is measured first in a round
        if part not in self._alone:
            self._alone[part] = KeptSession(self.config, self.host.sigmas(USUAL_STEPS), restarts=True)
        self._session = self._alone[part]
        if makes_pairs(phase):
            self._session.reset()
            self._session.begin_before(self.host.describe(sigma))
            if sigma in self.host.seen:
                self._session.observe(*self.host.seen[sigma])

    def restart(self, sigmas: list[float]) -> None:
        self._session = KeptSession(self.config, sigmas)

    def call(self, inputs: Inputs, sigma: float, step: int) -> Tensor:
        del step
        with self._session.call(self.host.describe(sigma)):
            out = self.host(inputs)
        self._session.observe(*self.host.halves(out))
        return out

    def counted(self) -> tuple[int, int]:
        """How many layers made pairs in the last call, and how many used older ones."""
        layers = self._session.stats.calls[-1].layers.values() if self._session.stats.calls else ()
        return sum(layer.pairings_made for layer in layers), sum(layer.pairings_reused for layer in layers)

    @property
    def notes(self) -> list[str]:
        """What the session passed through, and why."""
        return list(self._session.stats.notes)

    def phases_in(self, sigmas: list[float]) -> list[str]:
        return list(_phases_in(self.config, tuple(sigmas)))

    def kinds_in_run(self) -> list[str]:
        return [_kind(call.layers.values()) for call in self._session.stats.calls]

    def release(self) -> None:
        self._alone: dict[str, KeptSession] = {}  # by the part of the run whose single steps it is measured in
        self._session = KeptSession(self.config, self.host.sigmas(USUAL_STEPS))


def _kind(layers: Collection[LayerStats]) -> str:
    """What a step has done in these layers: one that made pairs in any of them is one that makes pairs."""
    made, reused = (any(getattr(layer, f"pairings_{did}") for layer in layers) for did in ("made", "reused"))
    return "refresh" if made else "reuse" if reused else PLAIN


@cache
def _phases_in(config: MergeConfig, sigmas: tuple[float, ...]) -> tuple[str, ...]:
    """The phase of each step: the policy decides as it does in a model; only drift cannot be known before."""
    session = MergeSession(config.with_(min_tokens=0, threshold=None), sigmas)
    x = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(0))
    phases = []
    for sigma in sigmas:
        with session.call(ModelCall(sigma, (8, 8), ("cond",), (0,))):
            session.merge(Layer("attn1", 0), x)
        kind = _kind(session.stats.calls[-1].layers.values())
        early = kind != PLAIN and config.early is not None and sigma > config.early_sigma
        phases.append(f"early {kind}" if early else kind)
    return tuple(phases)


class Stacked(Method):
    """Two methods at once, on top of each other; measured in whole runs."""

    phases, foreign = (), True

    def __init__(self, name: str, below: Method, above: Method) -> None:
        super().__init__(name, below.host)
        self._below, self._above = below, above

    @contextmanager
    def on(self) -> Iterator[None]:
        with self._below.on(), self._above.on():
            yield

    def restart(self, sigmas: list[float]) -> None:
        self._below.restart(sigmas)
        self._above.restart(sigmas)

    def kinds_in_run(self) -> list[str]:
        return self._above.kinds_in_run()

    def call(self, inputs: Inputs, sigma: float, step: int) -> Tensor:
        return self._above.call(inputs, sigma, step)

    def release(self) -> None:
        self._below.release()
        self._above.release()
