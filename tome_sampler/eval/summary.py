"""From rows to figures with intervals. Pictures of one prompt hang together, so prompts are what is resampled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from tome_sampler.eval.frechet import scene_distance
from tome_sampler.eval.methods import Method
from tome_sampler.eval.rows import Row

Values = NDArray[np.float64]
FIGURES = ("psnr", "ssim", "ms_ssim", "gmsd", "error_inside", "error_outside", "lpips", "clip")
PROPERTIES = ("colour", "shape", "size", "position")


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % bootstrap interval, which there is from four prompts on."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def above(self) -> bool | None:
        """Whether it is above zero (True) or below (False) beyond chance; None: neither."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return None
        return self.low > 0


def estimate(*columns: Values, statistic: Callable[..., Any] = np.mean) -> Estimate:
    """A statistic of columns that have a value for each prompt, in the same order; it takes them and an axis.

    Bias-corrected and accelerated where that can be computed, from 2000 resamples with a fixed seed.
    """
    value = float(statistic(*columns, axis=-1))
    if len(columns[0]) < 4 or all(np.ptp(column) == 0 for column in columns):
        return Estimate(value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says where BCa cannot be computed
        for method in ("BCa", "percentile"):
            found = bootstrap(
                columns, statistic, paired=True, n_resamples=2000, method=method, rng=np.random.default_rng(0)
            ).confidence_interval
            if np.isfinite([found.low, found.high]).all():
                return Estimate(value, float(found.low), float(found.high))
    return Estimate(value)


@dataclass(frozen=True)
class Point:
    """What a method came to over the set. Columns hold a value for each prompt, the mean over its seeds; NaN where
    there is none."""

    method: Method
    pictures: int
    columns: dict[str, Values]
    flops: float
    merged: float | None
    right: dict[str, float] | None
    to_drawn: float | None
    to_plain: float | None

    @property
    def seconds(self) -> float:
        return float(self.columns["unet_seconds"].mean())

    @property
    def speedup(self) -> float:
        """Plain U-Net seconds over its own, both summed over the set."""
        return float(self.columns["plain_seconds"].sum() / self.columns["unet_seconds"].sum())

    def speedup_estimate(self) -> Estimate:
        return estimate(self.columns["plain_seconds"], self.columns["unet_seconds"], statistic=_ratio)

    def has(self, figure: str) -> bool:
        return figure in self.columns and bool(np.isfinite(self.columns[figure]).all())

    def estimate(self, figure: str) -> Estimate | None:
        return estimate(self.columns[figure]) if self.has(figure) else None


def _ratio(above: Values, below: Values, axis: int) -> Any:
    return above.sum(axis=axis) / below.sum(axis=axis)


def points(methods: Sequence[Method], rows: Sequence[Row]) -> list[Point]:
    """A point for each method, over the pictures that all methods have."""
    by_method: dict[tuple[str, str], dict[tuple[str, int], Row]] = {}
    for row in rows:
        by_method.setdefault((row["method"], row["setting"]), {})[row["prompt"], row["seed"]] = row
    ours = [by_method.get((m.name, m.setting), {}) for m in methods]
    shared = [key for key in ours[0] if all(key in found for found in ours)]
    if not shared:
        return []
    plain = _features([ours[0][key] for key in shared])
    return [_point(m, [found[key] for key in shared], plain) for m, found in zip(methods, ours, strict=True)]


def _point(method: Method, rows: list[Row], plain: Values | None) -> Point:
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    place = {prompt: i for i, prompt in enumerate(prompts)}
    columns = {}
    for figure in (*FIGURES, "unet_seconds", "plain_seconds"):
        sums, counts = np.zeros(len(prompts)), np.zeros(len(prompts))
        for row in rows:
            value = row.get(figure)
            sums[place[row["prompt"]]] += np.nan if value is None else value
            counts[place[row["prompt"]]] += 1
        columns[figure] = sums / counts
    merged = [row["merged_fraction"] for row in rows if row["merged_fraction"] is not None]
    objects = sum(row.get("objects", 0) for row in rows)
    right = None
    if objects:
        right = {name: sum(row["right"][name] for row in rows if "right" in row) / objects for name in PROPERTIES}
    features = _features(rows)
    return Point(
        method=method,
        pictures=len(rows),
        columns=columns,
        flops=rows[0]["flops"],
        merged=sum(merged) / len(merged) if merged else None,
        right=right,
        to_drawn=None if features is None else scene_distance(features),
        to_plain=None if features is None or plain is None or method.is_plain else scene_distance(features, plain),
    )


def _features(rows: Sequence[Row]) -> Values | None:
    if len(rows) < 2 or any("features" not in row for row in rows):
        return None
    return np.array([row["features"] for row in rows])


@dataclass(frozen=True)
class Match:
    """Our curve against a point of another's, at the same speed. psnr, ssim: ours less theirs. inside: our error inside
    the named objects in parts of theirs. faster: our speed-up where our slowest setting is faster than theirs already,
    and that is compared."""

    theirs: Point
    psnr: Estimate
    ssim: Estimate
    inside: Estimate | None
    faster: float | None


def match(curve: Sequence[Point], theirs: Point) -> Match | None:
    """Our curve, straight between its points, at the speed of a point; None where no setting of ours is as fast."""
    ordered = sorted(curve, key=lambda point: point.speedup)
    if theirs.speedup > ordered[-1].speedup:
        return None
    upper = next(i for i, point in enumerate(ordered) if point.speedup >= theirs.speedup)
    low, high = ordered[max(upper - 1, 0)], ordered[upper]
    span = high.speedup - low.speedup
    share = 1.0 if span == 0 else (theirs.speedup - low.speedup) / span

    def ours(figure: str) -> Values:
        return (1 - share) * low.columns[figure] + share * high.columns[figure]

    inside = None
    if theirs.has("error_inside") and high.has("error_inside"):
        inside = estimate(ours("error_inside"), theirs.columns["error_inside"], statistic=_ratio)
    return Match(
        theirs=theirs,
        psnr=estimate(ours("psnr") - theirs.columns["psnr"]),
        ssim=estimate(ours("ssim") - theirs.columns["ssim"]),
        inside=inside,
        faster=high.speedup if upper == 0 and high.speedup > theirs.speedup else None,
    )
