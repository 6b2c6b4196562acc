"""What was measured, as plain rows: one for each method and kind of step."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tome_sampler.bench.limits import Bound, Plan, Short, ZeroOverhead
from tome_sampler.bench.methods import LENGTHS, PLAIN, USUAL_STEPS, Method, makes_pairs, part_of
from tome_sampler.bench.parts import PARTS
from tome_sampler.bench.rounds import Findings
from tome_sampler.bench.timing import Taken

Series = Sequence[float]


def rows_of(found: Findings, common: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows with `common` in each. seconds, seconds_iqr: median and quartiles' distance, of one model call. speedup:
    plain's seconds over its own, the median over rounds. share_of_bound: likewise, zero_overhead's over its own: that
    of the same settings, which `zero_overhead` names; of a bound, that of the method whose bound it is; of plain, the
    first one; None: it has none, as it does not shorten sequences.
    overhead_refresh, overhead_reuse: the part of a step that zero_overhead saves, on average over the run's steps that
    make pairs, and over those that use older ones; of a whole run: of its own steps, each beside zero_overhead's; of a
    single step: over those of its part of the run. kind: "step"; "composed": put together from steps, each kind as
    often as it is in a run of `steps`; "run": a whole run of `steps`. merged_fraction: on average over the run's steps,
    likewise.
    overhead_in_parts: the part of a step that stopwatches found in matching, merge and unmerge; it has less noise than
    a difference of two steps, and less in it: nothing between these parts.
    """
    return [
        {**common, **row}
        for method in found.methods
        for row in (
            *(_composed(found, method, length) for length in LENGTHS if _has_kinds(found, method)),
            *_steps(found, method),
            *_runs(found, method),
        )
    ]


def _has_kinds(found: Findings, method: Method) -> bool:
    """Whether a run of it is more than the same step again and again."""
    return any(method.phases) or len(_kinds(found, method, USUAL_STEPS)) > 1


def _kinds(found: Findings, method: Method, length: int) -> Counter[str]:
    """How often each phase is in a run."""
    return Counter(method.phases_in(found.host.sigmas(length)))


def _seconds(found: Findings, method: Method, phase: str) -> list[float]:
    """Of its steps of a phase, round by round."""
    name = found.methods[0].name if phase == PLAIN else method.label(phase)
    return [taken.seconds for taken in found.steps[name]]


def _mixed(found: Findings, method: Method, length: int) -> list[float]:
    """Of a step of a run, on average over the kinds of steps in it, round by round."""
    kinds = _kinds(found, method, length)
    taken = zip(*(_seconds(found, method, phase) for phase in kinds), strict=True)
    return [_mean(seconds, list(kinds.values())) for seconds in taken]


def _alike(found: Findings, phase: str, other: Method) -> list[float]:
    """Seconds of what another method does instead of a step: in this part of the run, or, of a method that does the
    same in all parts, on average over those of the other."""
    if phase or "" in other.phases:
        return _seconds(found, other, next((p for p in (phase, part_of(phase)) if p in other.phases), ""))
    return _mixed(found, other, USUAL_STEPS)


def _steps(found: Findings, method: Method) -> list[dict[str, Any]]:
    rows = []
    for phase in method.phases:
        name, part = method.label(phase), part_of(phase)
        cost, own = found.costs[name], _seconds(found, method, phase)
        kinds = Counter(other for other in method.phases if part_of(other) == part)
        plan = found.plans[method.name].parts[part] if method.merges else {}
        row = {
            "method": name,
            "kind": "step",
            "steps": 1,
            **_figures(found, method, own, partial(_alike, found, phase), [plan]),
            **_overheads(found, method, kinds),
            "seconds_wall": statistics.median(taken.wall for taken in found.steps[name]),
            "peak_mb": cost.peak / 2**20,
        }
        if method.merges:
            layers = max(sum(short.outer for short in plan.values()), 1)
            row |= {f"seconds_{part}": cost.seconds[part] for part in PARTS}
            row["overhead_in_parts"] = sum(cost.seconds.values()) / statistics.median(own)
            row["launches_per_layer"] = {part: cost.launches[part] / layers for part in PARTS}
            row["operators"] = cost.operators
        rows.append(row)
    return rows


def _composed(found: Findings, method: Method, length: int) -> dict[str, Any]:
    phases = method.phases_in(found.host.sigmas(length))
    plans = found.plans[method.name].composed(phases) if method.merges else []
    mixed = _mixed(found, method, length)
    return {
        "method": method.name,
        "kind": "composed",
        "steps": length,
        "steps_with_new_pairs": sum(map(makes_pairs, phases)) if method.merges else None,
        **_figures(found, method, mixed, lambda other: _mixed(found, other, length), plans),
        **_overheads(found, method, Counter(phases)),
        "peak_mb": _peak(found, method),
    }


def _runs(found: Findings, method: Method) -> list[dict[str, Any]]:
    rows = []
    for length, taken in found.runs.items():
        if method.name not in taken:
            continue
        steps = [t.seconds for t in taken[method.name]]
        of = partial(_average, taken)
        plans = found.plans[method.name].in_run(method.phases_in(found.host.sigmas(length))) if method.merges else []
        kinds = found.kinds[length][method.name]
        rows.append(
            {
                "method": method.name,
                "kind": "run",
                "steps": length,
                "steps_with_new_pairs": sum(map(makes_pairs, kinds)) if method.merges else None,
                **_figures(found, method, of(method), of, plans),
                **_overheads_in_run(found, method, taken, kinds),
                "seconds_iqr": _iqr(steps),
                "seconds_run": sum(steps),
                "seconds_wall": sum(t.wall for t in taken[method.name]) / length,
                "peak_mb": _peak(found, method),
            }
        )
    return rows


def _average(taken: dict[str, list[Taken]], method: Method) -> list[float]:
    """Seconds of a step of its whole run."""
    return [statistics.fmean(step.seconds for step in taken[method.name])]


def _figures(
    found: Findings, method: Method, own: Series, of: Callable[[Method], Series], plans: Sequence[Plan]
) -> dict[str, Any]:
    """What compares a method's seconds with others': in pairs, round by round, before the median is taken. of: another
    method's `own`. plans: of the steps that this is about."""
    speedups = [a / b for a, b in zip(of(found.methods[0]), own, strict=True)]
    bound, _ = found.limits.get(method.name, (None, None))
    reference = _reference(found, method)
    shares = [] if reference is None else [a / b for a, b in zip(of(reference), own, strict=True)]
    return {
        "seconds": statistics.median(own),
        "seconds_iqr": _iqr(own),
        "speedup": statistics.median(speedups),
        "speedup_iqr": _iqr(speedups),
        "share_of_bound": statistics.median(shares) if shares else None,
        "zero_overhead": None if reference is None else reference.name,
        "bound": None if bound is None else bound.name,
        "merged_fraction": _merged(plans) if method.name in found.plans else None,
        "rounds": len(own),
    }


def _reference(found: Findings, method: Method) -> Method | None:
    """The zero_overhead that a method's speed is a share of: its own, of plain the first one, else none."""
    if isinstance(method, ZeroOverhead):
        return method
    if method is found.methods[0]:
        return next((m for m in found.methods if m.name == "zero_overhead"), None)
    _, zero = found.limits.get(method.of.name if isinstance(method, Bound) else method.name, (None, None))
    return zero


def _overheads(found: Findings, method: Method, kinds: Counter[str]) -> dict[str, float | None]:
    """Of steps that were measured alone, where each kind is so often."""
    return {
        "overhead_refresh": _overhead(found, method, {k: n for k, n in kinds.items() if makes_pairs(k)}),
        "overhead_reuse": _overhead(found, method, {k: n for k, n in kinds.items() if not makes_pairs(k)}),
    }


def _overheads_in_run(
    found: Findings, method: Method, taken: dict[str, list[Taken]], kinds: Sequence[str]
) -> dict[str, float | None]:
    """Of a whole run's own steps, each beside the same step of zero_overhead's run."""
    _, zero = found.limits.get(method.name, (None, None))
    lost: defaultdict[str, list[float]] = defaultdict(list)
    if zero is not None:
        for kind, free, own in zip(kinds, taken[zero.name], taken[method.name], strict=True):
            lost[kind].append(1 - free.seconds / own.seconds)
    return {f"overhead_{kind}": statistics.fmean(lost[kind]) if lost[kind] else None for kind in ("refresh", "reuse")}


def _overhead(found: Findings, method: Method, kinds: dict[str, int]) -> float | None:
    """(t - t_zero) / t of these kinds of steps, on average by how often they are; those that were measured alone."""
    _, zero = found.limits.get(method.name, (None, None))
    counts = [count for phase, count in kinds.items() if phase in method.phases]
    if zero is None or not counts:
        return None
    lost = []
    for phase in (phase for phase in kinds if phase in method.phases):
        own, free = _seconds(found, method, phase), _alike(found, phase, zero)
        lost.append([1 - z / t for z, t in zip(free, own, strict=True)])
    return statistics.median(_mean(parts, counts) for parts in zip(*lost, strict=True))


def _peak(found: Findings, method: Method) -> float | None:
    peaks = [found.costs[method.label(phase)].peak for phase in method.phases]
    return max(peaks) / 2**20 if peaks else None


def _merged(plans: Sequence[Plan]) -> float:
    """The fraction of the tokens that is merged away in the blocks in which any of these steps merges: in the whole
    block, or on average in those of its parts where the step does."""
    steps: list[defaultdict[str, list[Short]]] = []
    for plan in plans:
        steps.append(defaultdict(list))
        for short in plan.values():
            if short.outer:
                steps[-1][short.block].append(short)
    tokens = {block: shorts[0].shape[0] * shorts[0].tokens for step in steps for block, shorts in step.items()}
    before = len(plans) * sum(tokens.values())
    left_out = sum(
        tokens[block] * statistics.fmean(1 - short.shape[1] / short.tokens for short in shorts)
        for step in steps
        for block, shorts in step.items()
    )
    return left_out / before if before else 0.0


def _mean(values: Series, counts: Sequence[int]) -> float:
    """Of values that occur so often."""
    return sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)


def _iqr(values: Series) -> float:
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first
