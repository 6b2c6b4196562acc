"""What was measured, as plain rows: one for each method and kind of step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from tome_sampler.bench.limits import Plan
from tome_sampler.bench.methods import Method
from tome_sampler.bench.parts import PARTS
from tome_sampler.bench.rounds import Findings

Series = Sequence[float]
LENGTHS = (20, 50)
"""Of the runs that single steps are put together to."""


def rows_of(found: Findings, common: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows with `common` in each. seconds, seconds_iqr: median and quartiles' distance, of one model call. speedup:
    plain's seconds over its own, the median over rounds. share_of_bound: zero_overhead's over its own, likewise.
    overhead_refresh, overhead_reuse: the part of a step that zero_overhead saves. kind: "step"; "composed": put
    together from steps as the refresh policy mixes them in a run of `steps`; "run": a whole run of `steps`.
    overhead_in_parts: the part of a step that stopwatches found in matching, merge and unmerge; it has less noise than
    a difference of two steps, and less in it: nothing between these parts.
    """
    return [
        {**common, **row}
        for method in found.methods
        for row in (
            *(_composed(found, method, length) for length in LENGTHS if "refresh" in method.phases),
            *_steps(found, method),
            *_runs(found, method),
        )
    ]


def _steps(found: Findings, method: Method) -> list[dict[str, Any]]:
    rows = []
    for name in (f"{method.name}/{phase}" if phase else method.name for phase in method.phases):
        cost, taken = found.costs[name], found.steps[name]
        row = {
            "method": name,
            "kind": "step",
            "steps": 1,
            **_figures(found, method, [t.seconds for t in taken], lambda n: [t.seconds for t in found.steps[n]]),
            "seconds_wall": statistics.median(t.wall for t in taken),
            "peak_mb": cost.peak / 2**20,
        }
        if method.merges:
            layers = max(sum(short.outer for short in found.plans[method.name].values()), 1)
            row |= {f"seconds_{part}": cost.seconds[part] for part in PARTS}
            row["overhead_in_parts"] = sum(cost.seconds.values()) / statistics.median(t.seconds for t in taken)
            row["launches_per_layer"] = {part: cost.launches[part] / layers for part in PARTS}
            row["operators"] = cost.operators
        rows.append(row)
    return rows


def _composed(found: Findings, method: Method, length: int) -> dict[str, Any]:
    made, reused = method.made_in(found.host.sigmas(length))
    plain = [t.seconds for t in found.steps[found.methods[0].name]]
    refresh = [t.seconds for t in found.steps[f"{method.name}/refresh"]]
    reuse = [t.seconds for t in found.steps.get(f"{method.name}/reuse", [])] or refresh
    rest = length - made - reused
    mixed = [(made * a + reused * b + rest * c) / length for a, b, c in zip(refresh, reuse, plain, strict=True)]
    return {
        "method": method.name,
        "kind": "composed",
        "steps": length,
        "steps_with_new_pairs": made,
        **_figures(found, method, mixed, lambda n: [t.seconds for t in found.steps[n]]),
        "peak_mb": _peak(found, method),
    }


def _runs(found: Findings, method: Method) -> list[dict[str, Any]]:
    rows = []
    for length, taken in found.runs.items():
        if method.name not in taken:
            continue
        steps = [t.seconds for t in taken[method.name]]
        total = {name: [sum(t.seconds for t in of) / length] for name, of in taken.items()}
        rows.append(
            {
                "method": method.name,
                "kind": "run",
                "steps": length,
                "steps_with_new_pairs": found.made[length][method.name] if method.merges else None,
                **_figures(found, method, total[method.name], total.__getitem__),
                "seconds_iqr": _iqr(steps),
                "seconds_run": sum(steps),
                "seconds_wall": sum(t.wall for t in taken[method.name]) / length,
                "peak_mb": _peak(found, method),
            }
        )
    return rows


def _figures(found: Findings, method: Method, own: Series, of: Callable[[str], Series]) -> dict[str, Any]:
    """Everything that compares: in pairs, round by round, before the median is taken."""
    plain = of(found.methods[0].name)
    speedups = [a / b for a, b in zip(plain, own, strict=True)]
    bound, zero = found.limits.get(method.name, (None, None))
    reference = zero or next((m for m in ("zero_overhead",) if any(x.name == m for x in found.methods)), None)
    shares = [] if reference is None else [a / b for a, b in zip(of(reference), own, strict=True)]
    plan = found.plans.get(method.name)
    return {
        "seconds": statistics.median(own),
        "seconds_iqr": _iqr(own),
        "speedup": statistics.median(speedups),
        "speedup_iqr": _iqr(speedups),
        "share_of_bound": statistics.median(shares) if shares else None,
        "overhead_refresh": _overhead(found, method, "refresh") if zero else None,
        "overhead_reuse": _overhead(found, method, "reuse") if zero else None,
        "zero_overhead": reference,
        "bound": bound,
        "merged_fraction": None if plan is None else _merged(plan),
        "rounds": len(own),
    }


def _overhead(found: Findings, method: Method, phase: str) -> float | None:
    """(t - t_zero) / t of its steps that make pairs, or of those that use older ones. Without phases it makes them."""
    name = f"{method.name}/{phase}" if phase in method.phases else method.name if phase == "refresh" else ""
    own, zero = found.steps.get(name), found.steps[found.limits[method.name][1]]
    return None if own is None else statistics.median(1 - z.seconds / t.seconds for z, t in zip(zero, own, strict=True))


def _peak(found: Findings, method: Method) -> float | None:
    peaks = [found.costs[f"{method.name}/{phase}" if phase else method.name].peak for phase in method.phases]
    return max(peaks) / 2**20 if peaks else None


def _merged(plan: Plan) -> float:
    outer = [short for short in plan.values() if short.outer]
    before = sum(short.shape[0] * short.tokens for short in outer)
    return 1 - sum(short.shape[0] * short.shape[1] for short in outer) / before if before else 0.0


def _iqr(values: Series) -> float:
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first
