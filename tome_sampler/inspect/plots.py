"""What ``inspect`` saw, drawn. matplotlib is imported when something is drawn, without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from tome_sampler.inspect.probe import BINS, Watched
from tome_sampler.inspect.tune import Proposal
from tome_sampler.overlay import group_map, heat_map
from tome_sampler.pairing import Pairing

_DPI = 90


def require_matplotlib() -> None:
    """Say that it is missing, before there is anything to draw.

    Raises:
        ImportError: so it is.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ImportError("inspect draws with matplotlib: pip install 'tome-sampler[inspect]'") from None


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})


def _layers(calls: Sequence[Watched]) -> list[str]:
    return list(dict.fromkeys(name for call in calls for name in call.layers))


def short(name: str) -> str:
    """A layer's name, shortened: "down_blocks.0.attentions.0.transformer_blocks.0.attn1" as "down 0.0.0 attn1"."""
    words = name.replace("transformer_blocks", "").replace("attentions", "").replace("_blocks", "").split(".")
    numbers = ".".join(word for word in words if word.isdigit())
    named = [word for word in words if word and not word.isdigit() and word not in ("unet", "attn1")]
    return " ".join([*named[:1], numbers, *(w for w in words[-1:] if w == "attn1")])


def similarities(calls: Sequence[Watched], threshold: float | None, path: Path) -> None:
    """Histograms of the best similarity, one column for each call, one panel for each layer (at most eight)."""
    names = _layers(calls)[:8]
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    figure = _figure(3.2 * columns + 0.6, 2.8 * rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    first = int(BINS * 0.5)  # similarities below 0 are rare
    image = None
    for place, name in enumerate(names):
        ax = axes[place // columns][place % columns]
        seen = [
            call.layers[name].histogram[first:] if name in call.layers else [0.0] * (BINS - first) for call in calls
        ]
        image = ax.imshow(
            np.sqrt(np.array(seen).T),
            origin="lower",
            aspect="auto",
            cmap="magma",
            extent=(-0.5, len(calls) - 0.5, 0, 1),
        )
        if threshold is not None:
            ax.axhline(threshold, color="white", linewidth=0.8, linestyle="--")
        ax.set_title(short(name), fontsize=9)
        ax.set_xlabel("model call", fontsize=8)
    for place in range(len(names), rows * columns):
        axes[place // columns][place % columns].set_visible(False)
    axes[0][0].set_ylabel("best similarity", fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=axes, label="share of the sources, square root", shrink=0.8)
    _save(figure, path)


def distances(calls: Sequence[Watched], path: Path) -> None:
    """Jaccard distance between the pairs of adjacent calls, a line for each layer."""
    figure = _figure(6.4, 3.6)
    ax = figure.subplots()
    for name in _layers(calls):
        looks = [(i, call.layers[name].jaccard) for i, call in enumerate(calls) if name in call.layers]
        points = [(i, jaccard) for i, jaccard in looks if jaccard is not None]
        ax.plot([i for i, _ in points], [j for _, j in points], label=short(name), linewidth=1.2)
    ax.set_ylim(0, 1)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("model call")
    ax.set_ylabel("Jaccard distance to the call before")
    ax.legend(fontsize=7)
    _save(figure, path)


def tokens(stats: dict[str, Any], path: Path) -> None:
    """The share of the tokens that was merged, for each layer and call of a merged run."""
    names = list(stats["layers"])
    steps = stats["steps"]
    shares = [[step["layers"].get(name, {}).get("merged_fraction", 0.0) for step in steps] for name in names]
    figure = _figure(6.4, 1.2 + 0.3 * len(names))
    ax = figure.subplots()
    image = ax.imshow(np.array(shares), aspect="auto", cmap="viridis", vmin=0, vmax=1)
    ax.set_yticks(range(len(names)), [short(name) for name in names], fontsize=8)
    ax.set_xlabel("model call")
    ax.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=ax, label="share merged")
    _save(figure, path)


def maps(
    picture: Tensor, seen: Sequence[tuple[int, Tensor | None, Pairing | None, tuple[int, int] | None]], path: Path
) -> None:
    """Importance and merged groups over the picture (3 h w), at some steps: (step, importance, pairing, its grid)."""
    figure = _figure(2.3 * len(seen), 4.9)
    axes = figure.subplots(2, len(seen), squeeze=False)
    for column, (step, importance, pairing, grid) in enumerate(seen):
        if importance is not None:
            heat = torch.nn.functional.interpolate(heat_map(importance.cpu())[None], picture.shape[1:])[0]
            axes[0][column].imshow(_pixels(picture * 0.35 + heat * 0.65))
        if pairing is not None and grid is not None:
            axes[1][column].imshow(_pixels(group_map(picture, pairing.target[0].cpu(), grid)))
        axes[0][column].set_title(f"step {step}", fontsize=9)
        for row, what in enumerate(("importance", "merged groups")):
            axes[row][column].set_xticks([])
            axes[row][column].set_yticks([])
            if column == 0:
                axes[row][column].set_ylabel(what, fontsize=9)
    _save(figure, path)


def proposal(found: Proposal, path: Path) -> None:
    """What thresholds merge, and what keeping pairs loses."""
    figure = _figure(8.0, 3.2)
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*found.thresholds, strict=True))
    left.axvline(found.config.threshold, color="grey", linestyle="--", linewidth=0.8)
    left.set_xlabel("threshold")
    left.set_ylabel("share of the tokens merged")
    ratios, lost, made = zip(*found.refreshes, strict=True)
    places, beside = range(len(ratios)), right.twinx()
    right.plot(places, lost, marker=".", color="tab:blue")
    beside.plot(places, made, marker=".", color="tab:orange")
    right.set_xticks(places, [f"{ratio:g}" for ratio in ratios])
    right.set_xlabel("pairs kept until sigma has fallen by")
    right.set_ylabel("similarity lost", color="tab:blue")
    beside.set_ylabel("share of calls with new pairs", color="tab:orange")
    beside.set_ylim(bottom=0)
    _save(figure, path)


def _pixels(picture: Tensor) -> Any:
    return rearrange((picture.clamp(-1, 1) + 1) / 2, "c h w -> h w c").numpy()
