"""The three published methods and our default, again: slow, plain Python and doubles, from the papers' descriptions
(docs of the reference: algorithms.md). Nothing here is shared with the package.

A target map is a list: the token that each token is represented by. One image (n c) at a time.
"""

from __future__ import annotations

import numpy as np

Vectors = np.ndarray
TABLE = {0.1: (1.00, 0, 0.10, 0.65), 0.3: (0.98, 0.02, 0.28, 0.45), 0.5: (0.70, 0.30, 0.20, 0.25)}
TABLE |= {0.7: (0.42, 0.58, 0.12, 0.05), 0.75: (0.35, 0.65, 0.10, 0.0)}
"""Importance-based merging's budget at pool 1.4: ratio -> pool, unimportant merged, important merged, independent."""


def best(metric: Vectors, token: int, options: list[int]) -> tuple[float, int]:
    """The most similar of `options`, and its cosine."""
    a, others = metric[token].astype(np.float64), [metric[o].astype(np.float64) for o in options]
    scores = [float(a @ o / (np.linalg.norm(a) * np.linalg.norm(o))) for o in others]
    return max(scores), options[int(np.argmax(scores))]


def top_left(h: int, w: int, stride: int) -> list[int]:
    return [y * w + x for y in range(0, h - h % stride, stride) for x in range(0, w - w % stride, stride)]


def apply(matches: dict[int, tuple[float, int]], merged: list[int], n: int) -> list[int]:
    return [matches[t][1] if t in set(merged) else t for t in range(n)]


def tomesd(metric: Vectors, dst: list[int], r: int) -> list[int]:
    """Section 1: the r most similar sources join their most similar destination."""
    n = len(metric)
    matches = {t: best(metric, t, dst) for t in range(n) if t not in dst}
    return apply(matches, sorted(matches, key=lambda t: -matches[t][0])[:r], n)


def ca_tome(batch: list[Vectors], dst: list[int], threshold: float) -> list[list[int]]:
    """Section 3: as many as the row with most sources above the threshold has, in every row."""
    counts = []
    for metric in batch:
        counts.append(sum(best(metric, t, dst)[0] >= threshold for t in range(len(metric)) if t not in dst))
    return [tomesd(metric, dst, max(counts)) for metric in batch]


def pooled(importance: Vectors, h: int, w: int) -> list[float]:
    """A map whose sides are multiples of (h, w), averaged over areas, row by row."""
    fy, fx = importance.shape[0] // h, importance.shape[1] // w
    return [
        float(np.mean([importance[y * fy + i, x * fx + j] for i in range(fy) for j in range(fx)]))
        for y in range(h)
        for x in range(w)
    ]


def pool(importance: list[float], r: int, size: float) -> list[int]:
    """Section 2.2: the most important tokens."""
    n = len(importance)
    return sorted(range(n), key=lambda t: -importance[t])[: min(int(size * (n - r)), n)]


def importance_based(metric: Vectors, dst: list[int], importance: list[float], r: int, size: float = 1.4) -> list[int]:
    """Section 2.5: all outside the pool are merged, then the most similar of the pool; the others stay."""
    n, inside = len(metric), pool(importance, r, size)
    matches = {t: best(metric, t, dst) for t in range(n) if t not in dst}
    outside = [t for t in matches if t not in inside]
    others = sorted((t for t in matches if t in inside), key=lambda t: -matches[t][0])
    return apply(matches, (outside + others)[:r], n)


def ours(
    metric: Vectors,
    importance: list[float] | None,
    h: int,
    w: int,
    stride: int,
    ratio: float,
    threshold: float,
    floor: float,
    weight: float,
    near: int,
) -> list[int]:
    """The default: a destination in each cell, its most important token; of the destinations at most `near` cells away
    the most similar; merged is what stays above the threshold with its importance's rank taken off,
    but at least `floor` and at most `ratio` of all."""
    n = h * w
    rank = [0.5] * n
    if importance is not None:
        for place, token in enumerate(sorted(range(n), key=lambda t: importance[t])):
            rank[token] = place / (n - 1)
    dst = {}
    for cy in range(-(-h // stride)):
        for cx in range(-(-w // stride)):
            inside = [
                y * w + x
                for y in range(cy * stride, min(cy * stride + stride, h))
                for x in range(cx * stride, min(cx * stride + stride, w))
            ]
            dst[cy, cx] = max(inside, key=lambda t: rank[t])
    matches, score = {}, {}
    for token in range(n):
        if token not in dst.values():
            cy, cx = token // w // stride, token % w // stride
            around = [d for (y, x), d in dst.items() if abs(y - cy) <= near and abs(x - cx) <= near]
            matches[token] = best(metric, token, around)
            score[token] = matches[token][0] - (weight * rank[token] if importance is not None else 0)
    most = min(int(n * ratio), len(matches))
    wanted = min(max(sum(s >= threshold for s in score.values()), min(int(n * floor), most)), most)
    return apply(matches, sorted(score, key=lambda t: -score[t])[:wanted], n)
