"""Figures as tables."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence

import torch

from tome_sampler.eval.methods import OURS, PAPERS, PEERS
from tome_sampler.eval.rows import Row
from tome_sampler.eval.summary import PROPERTIES, Estimate, Match, Point, estimate, match

_EMPTY = ""


def conditions(run: Row, points: Sequence[Point]) -> str:
    """What was run, in one line."""
    prompts = len(points[0].columns["psnr"])
    height, width = run["size"]
    more = f", {run['dtype']}" if "dtype" in run else ""
    more += f", negative prompt “{run['negative']}”" if "negative" in run else ""
    return (
        f"{run['model']}, {width}x{height} pixels, {run['sampler']}, {run['steps']} steps, cond_scale "
        f"{run['cond_scale']:g}, batch {run['batch']}: {points[0].pictures} pictures of {prompts} prompts for each "
        f"method, first seed {run['first_seed']}. {platform.machine()}, torch {torch.__version__}, {run['device']}, "
        f"{run['threads']} thread{'s' * (run['threads'] > 1)}, {run['clock']}{more}. In brackets: 95 % bootstrap "
        "intervals over prompts."
    )


def table(points: Sequence[Point]) -> str:
    """A line a method: how fast it is, and what is kept of the plain picture of the same seed; means."""
    return _markdown(
        ["method", "U-Net, s", "speed-up", "GFLOP", "merged", "PSNR, dB", "SSIM", "error inside"],
        [
            [
                point.method.label,
                f"{point.seconds:.2f}",
                _interval(point.speedup_estimate(), 2, "x"),
                f"{point.flops / 1e9:.0f}",
                _EMPTY if point.merged is None else f"{point.merged:.0%}",
                *_fidelity(point, psnr=1, ssim=4, error_inside=4),
            ]
            for point in points
        ],
    )


def further_table(points: Sequence[Point]) -> str:
    """The other figures, and those of the whole set."""
    heads = ["method", "MS-SSIM", "GMSD", "error outside", "LPIPS", "CLIP", "objects right, %"]
    return _markdown(
        [*heads, "scene FD to drawn", "scene FD to plain"],
        [
            [
                point.method.label,
                *_fidelity(point, ms_ssim=4, gmsd=4, error_outside=4, lpips=4),
                _interval(point.estimate("clip"), 2),
                _EMPTY if point.right is None else " / ".join(f"{100 * point.right[name]:.1f}" for name in PROPERTIES),
                *(_EMPTY if value is None else f"{value:.4g}" for value in (point.to_drawn, point.to_plain)),
            ]
            for point in points
        ],
    )


def _fidelity(point: Point, **digits: int) -> list[str]:
    """Figures to the plain picture, which the plain one has none of."""
    if point.method.is_plain:
        return [_EMPTY] * len(digits)
    return [_interval(point.estimate(figure), number) for figure, number in digits.items()]


def curves(points: Iterable[Point]) -> dict[str, list[Point]]:
    """Points by what their settings have in common, each sorted by speed."""
    found: dict[str, list[Point]] = {}
    for point in points:
        if point.method.name != "plain":
            found.setdefault(point.method.curve, []).append(point)
    return {name: sorted(those, key=lambda point: point.speedup) for name, those in found.items()}


def matches(points: Sequence[Point], curve: str | None) -> tuple[str, list[tuple[Point, Match | None]]]:
    """Another's every point beside a curve of ours at the same speed; by default beside our longest curve."""
    ours = {name: those for name, those in curves(points).items() if those[0].method.name in OURS}
    if not ours:
        return "", []
    name = max(ours, key=lambda key: len(ours[key])) if curve is None else curve
    others = [p for p in points if p.method.name in (*PEERS, *PAPERS)]
    return name, [(other, match(ours[name], other)) for other in others]


def matched_table(found: Sequence[tuple[Point, Match | None]]) -> str:
    """Ours less theirs, at their speed."""
    rows = []
    for theirs, pair in found:
        start = [theirs.method.label, f"{theirs.speedup:.2f}x"]
        if pair is None:
            rows.append([*start, "no setting of ours is as fast", "", "", ""])
            continue
        at = "the same" if pair.faster is None else f"{pair.faster:.2f}x"
        inside = _EMPTY if pair.inside is None else _interval(pair.inside, 2)
        rows.append([*start, at, _interval(pair.psnr, 1, sign=True), _interval(pair.ssim, 4, sign=True), inside])
    heads = ["theirs", "speed-up", "ours at", "PSNR, dB, ours less theirs", "SSIM, ours less theirs"]
    return _markdown([*heads, "error inside, ours / theirs"], rows)


_ALIGNED = "---"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    used = [i for i in range(len(heads)) if i == 0 or any(row[i] for row in rows)]
    lines = [[heads[i] for i in used], [_ALIGNED] * len(used), *([row[i] for i in used] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _interval(estimate: Estimate | None, digits: int, unit: str = "", *, sign: bool = False) -> str:
    if estimate is None:
        return _EMPTY
    form = f"{'+' if sign else ''}.{digits}f"
    text = f"{estimate.value:{form}}{unit}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{estimate.low:{form}}, {estimate.high:{form}}]"


def differences(points: Sequence[Point], against: str) -> str:
    """Every method's figures less those of one of them, which is known by its label."""
    other = next(point for point in points if point.method.label == against)
    rows = []
    for point in points:
        if point is other or point.method.is_plain:
            continue
        row = [point.method.label, f"{point.speedup:.2f}x", _EMPTY if point.merged is None else f"{point.merged:.0%}"]
        for figure, digits in (("psnr", 1), ("ssim", 4), ("gmsd", 4), ("error_inside", 4), ("error_outside", 4)):
            both = point.has(figure) and other.has(figure)
            less = estimate(point.columns[figure] - other.columns[figure]) if both else None
            row.append(_interval(less, digits, sign=True))
        rows.append(row)
    return _markdown(
        ["method", "speed-up", "merged", "PSNR, dB", "SSIM", "GMSD", "error inside", "error outside"], rows
    )


def report(
    run: Row, points: Sequence[Point], notes: Sequence[str], curve: str | None = None, against: str | None = None
) -> str:
    """Everything, as markdown."""
    if not points:
        return "No picture has been drawn by all methods yet.\n"
    parts = [conditions(run, points), table(points), further_table(points)]
    name, found = matches(points, curve)
    if found:
        parts += [f"At the same speed: {name}, straight between its settings.", matched_table(found)]
    if against is not None:
        parts += [f"Less {against}:", differences(points, against)]
    parts += list(notes)
    return "\n\n".join(parts) + "\n"
