"""All methods in one run: they take turns, so that each meets the same load of the machine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from tome_sampler.bench.host import Host
from tome_sampler.bench.limits import Bound, Limit, Plan, Plans, Seen, ZeroOverhead, plan_of, record
from tome_sampler.bench.methods import USUAL_STEPS, Inputs, Merged, Method, makes_pairs, part_of
from tome_sampler.bench.parts import Cost, profiled, seconds_in_parts
from tome_sampler.bench.timing import Taken, take

T = TypeVar("T")


@dataclass(frozen=True)
class Turn:
    """A single step of a method."""

    method: Method
    phase: str

    @property
    def name(self) -> str:
        return self.method.label(self.phase)


@dataclass
class Findings:
    """What was measured on one model. Lists of the same length belong together, round by round or step by step."""

    host: Host
    methods: list[Method]
    steps: dict[str, list[Taken]] = field(default_factory=dict)  # by turn
    runs: dict[int, dict[str, list[Taken]]] = field(default_factory=dict)  # by number of steps, and method
    kinds: dict[int, dict[str, list[str]]] = field(default_factory=dict)  # of the steps of these runs
    costs: dict[str, Cost] = field(default_factory=dict)  # by turn
    plans: dict[str, Plans] = field(default_factory=dict)  # by method
    limits: dict[str, tuple[Bound | None, ZeroOverhead]] = field(default_factory=dict)  # by method
    notes: list[str] = field(default_factory=list)


def rotated(items: Sequence[T], by: int) -> list[T]:
    """The items in turn, another one first each time."""
    first = by % max(len(items), 1)
    return [*items[first:], *items[:first]]


class Rounds:
    """A measurement on one host.

    Args:
        methods: the first one is the model as it is.
        repeats: timed rounds of single steps. steps: lengths of whole runs.
        bound: whether merged layers that return at once are measured too.
    """

    def __init__(self, host: Host, methods: list[Method], *, repeats: int, steps: Sequence[int], bound: bool) -> None:
        self.found = Findings(host, list(methods))
        self._host, self._repeats, self._lengths, self._bound = host, repeats, steps, bound
        self._inputs: dict[int, Inputs] = {}  # by the step of the usual run

    @torch.no_grad()
    def measure(self, bar: tqdm[Any]) -> Iterator[Findings]:
        """A warm-up round, timed rounds, two rounds that look inside, whole runs. Gives what is found so far after the
        single steps, and after the runs of each length, which may take hours."""
        self._bar, found = bar, self.found
        dry = sum(self._lengths) * sum(m.varies for m in found.methods)
        bar.total = sum(len(m.phases) for m in found.methods) + dry + self._calls_to_come()
        self._prepare({m.place(phase) for m in found.methods for phase in m.phases})
        self._warm_up()
        self._add_limits()
        bar.total = bar.n + self._calls_to_come()
        turns = [Turn(method, phase) for method in found.methods for phase in method.phases]
        for turn in (t for t in turns if isinstance(t.method, Limit)):
            self._step(turn, lambda call: call())
        for number in range(self._repeats):
            for turn in rotated(turns, number):
                if turn.method not in found.methods:
                    continue
                try:
                    _, taken = self._step(turn, partial(take, device=self._host.device))
                except Exception as error:
                    self._drop(turn.method, error)
                    continue
                found.steps.setdefault(turn.name, []).append(taken)
        self._look_inside([turn for turn in turns if turn.method in found.methods])
        yield found
        for length in self._lengths:
            self._run(length)
            yield found
        for method in found.methods:
            method.release()

    def _calls_to_come(self) -> int:
        """After the warm-up round."""
        methods = self.found.methods
        turns = sum(len(m.phases) for m in methods)
        merging = sum(len(m.phases) for m in methods if m.merges)
        limits = sum(len(m.phases) for m in methods if isinstance(m, Limit))
        return turns * (self._repeats + 1) + merging + limits + sum(self._lengths) * len(methods)

    def _step(self, turn: Turn, how: Callable[[Callable[[], Tensor]], T]) -> T:
        """A single step of a method, called as `how` says."""
        place = turn.method.place(turn.phase)
        inputs, sigma = self._inputs[place], self._host.sigmas(USUAL_STEPS)[place]
        turn.method.begin(turn.phase, sigma)
        self._bar.set_postfix_str(turn.name)
        with turn.method.on():
            out = how(lambda: turn.method.call(inputs, sigma, 0))
        self._bar.update()
        return out

    def _prepare(self, places: set[int]) -> None:
        """What the model is given, and gives, at the steps that are measured alone; denoised up to there, if it has
        learned to."""
        host, sigmas = self._host, self._host.sigmas(USUAL_STEPS)
        x = host.noise * sigmas[0]
        for step, sigma in enumerate(sigmas[: max(places, default=-1) + 1]):
            if not host.architecture.trained:
                if step not in places:
                    continue
                x = host.noise * math.sqrt(sigma**2 + 1)
            inputs = host.inputs(x, sigma)
            out = host(inputs)
            if step in places:
                self._inputs[step], host.seen[sigma] = inputs, host.halves(out)
            x = host.advance(x, out, sigma, [*sigmas, 0.0][step + 1])

    def _warm_up(self) -> None:
        """The first round. It also finds what each method makes of each layer."""
        found, sigmas, plain = self.found, self._host.sigmas(USUAL_STEPS), Seen()
        for method in list(found.methods):
            try:
                for phase in method.phases:
                    self._bar.set_postfix_str(f"{method.name}, warm-up")
                    place = method.place(phase)
                    method.begin(phase, sigmas[place])
                    seen, _ = record(method, self._inputs[place], sigmas[place], 0)
                    plain = plain or seen
                    if method.merges:
                        parts = found.plans.setdefault(method.name, Plans()).parts
                        _check(method, phase, bool(parts.setdefault(part_of(phase), plan_of(seen, plain))))
                    self._bar.update()
                if method.varies:
                    runs = {length: self._dry_run(method, length, plain) for length in self._lengths}
                    found.plans[method.name].runs.update(runs)
            except Exception as error:
                self._drop(method, error)
        for name in (name for name, plans in found.plans.items() if not any(plans.parts.values())):
            found.notes.append(f"{name} merges nothing in {self._host.name} at {self._host.size} pixels")
        varying = [method.name for method in found.methods if method.varies and method.phases]
        if varying:
            found.notes.append(
                f"what {', '.join(varying)} can merge depends on the picture; single steps, and what is put together "
                "from them, show it at one noise level of each part of a run, and whole runs (--steps) as it comes"
            )
        drifting = [m.name for m in found.methods if isinstance(m, Merged) and m.config.refresh.measures_drift]
        if drifting:
            found.notes.append(
                f"when {', '.join(drifting)} make pairs anew depends on the picture; what is put together from single "
                "steps does so as seldom as can be, and whole runs (--steps) as it comes"
            )
        for method in found.methods:
            if isinstance(method, Merged):
                found.notes += [note for note in method.notes if note not in found.notes]

    def _drop(self, method: Method, error: Exception) -> None:
        """A package that fails is told of; what fails in our code is an error."""
        if not method.foreign:
            raise error
        said = str(error).partition("\n")[0]
        self.found.notes.append(f"{method.name} does not run on {self._host.name}: {type(error).__name__}: {said}")
        self.found.methods.remove(method)
        self.found.plans.pop(method.name, None)

    def _dry_run(self, method: Method, length: int, plain: Seen) -> list[Plan]:
        """Where lengths depend on the picture, what each step of a run makes of each layer."""
        sigmas, plans = self._host.sigmas(length), []
        x = self._host.noise * sigmas[0]
        method.restart(sigmas)
        for step, sigma in enumerate(sigmas):
            self._bar.set_postfix_str(f"{method.name}, its lengths in step {step + 1} of {length}")
            seen, out = record(method, self._host.inputs(x, sigma), sigma, step)
            self._bar.update()
            plans.append(plan_of(seen, plain))
            x = self._host.advance(x, out, sigma, [*sigmas, 0.0][step + 1])
        return plans

    def _add_limits(self) -> None:
        """One bound for each set of layers, one zero_overhead for each set of lengths, shared by methods."""
        found = self.found
        bounds: dict[object, Bound] = {}
        zeros: dict[object, ZeroOverhead] = {}
        plain, *methods = found.methods
        merging = [m for m in methods if m.name in found.plans and any(found.plans[m.name].parts.values())]
        for method in sorted(merging, key=lambda m: m.name != "default"):
            name, plans = method.name, found.plans[method.name]
            bound = Bound(f"bound:{name}" if bounds else "bound", method, plans) if self._bound else None
            if bound is not None:
                bound = bounds.setdefault(bound.work_in_runs(self._lengths), bound)
            zero = ZeroOverhead(f"zero_overhead:{name}" if zeros else "zero_overhead", method, plans)
            zero = zeros.setdefault(zero.work_in_runs(self._lengths), zero)
            found.limits[name] = bound, zero
        found.methods[:] = [plain, *bounds.values()]
        for method in methods:  # a limit runs right before the first method that it is one of
            _, limit = found.limits.get(method.name, (None, None))
            if limit is not None and limit not in found.methods:
                found.methods.append(limit)
            found.methods.append(method)

    def _look_inside(self, turns: Sequence[Turn]) -> None:
        """Two more rounds: one with stopwatches in the parts, one under the profiler, from a fresh start."""
        device = self._host.device
        seconds = {t.name: self._step(t, partial(seconds_in_parts, device=device)) for t in turns if t.method.merges}
        for method in self.found.methods:
            method.release()
        for (method, _), part in itertools.groupby(turns, key=lambda turn: (turn.method, part_of(turn.phase))):
            before = 0
            for turn in part:
                cost, before = self._step(turn, partial(profiled, device=device, before=before))
                cost.seconds = seconds.get(turn.name, {})
                self.found.costs[turn.name] = cost
            method.release()  # what it keeps is none of the next one's memory, nor of its own later in a run

    def _run(self, length: int) -> None:
        """A whole run of each method, all of them step by step together, each on its own way to its own picture."""
        found, sigmas = self.found, self._host.sigmas(length)
        latents = {method.name: self._host.noise * sigmas[0] for method in found.methods}
        taken: dict[str, list[Taken]] = {method.name: [] for method in found.methods}
        for method in found.methods:
            method.restart(sigmas)
        for step, sigma in enumerate(sigmas):
            for method in rotated(found.methods, step):
                self._bar.set_postfix_str(f"{method.name}, step {step + 1} of {length}")
                inputs = self._host.inputs(latents[method.name], sigma)
                try:
                    with method.on():
                        out, one = take(partial(method.call, inputs, sigma, step), self._host.device)
                except Exception as error:
                    self._drop(method, error)
                    del taken[method.name]
                    continue
                taken[method.name].append(one)
                latents[method.name] = self._host.advance(latents[method.name], out, sigma, [*sigmas, 0.0][step + 1])
                self._bar.update()
        found.runs[length] = taken
        found.kinds[length] = {method.name: method.kinds_in_run() for method in found.methods}


def _check(method: Method, phase: str, merged: bool) -> None:
    """A step that is called a reuse must be one."""
    if isinstance(method, Merged) and merged:
        made, reused = method.counted()
        if (made > 0) != makes_pairs(phase) or not made + reused:
            raise RuntimeError(f"{method.name}/{phase} made pairs in {made} layers and used older ones in {reused}")
