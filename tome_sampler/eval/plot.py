"""Fidelity against speed, as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from tome_sampler.eval.methods import OURS
from tome_sampler.eval.report import curves
from tome_sampler.eval.summary import Point

PANELS = (("psnr", "PSNR to plain, dB"), ("ssim", "SSIM to plain"), ("error_inside", "error inside named objects"))


def plotter() -> Any:
    """matplotlib's pyplot, without a display.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            f"--plot needs matplotlib, which cannot be imported ({error}); pip install matplotlib"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(pyplot: Any, points: Sequence[Point], conditions: str) -> bytes:
    """A PNG: a curve a method, over speed-up, with 95 % intervals."""
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(5.2 * len(PANELS), 4.6), layout="constrained")
    for name, those in curves(points).items():
        ours = those[0].method.name in OURS
        for axis, (key, title) in zip(axes, PANELS, strict=True):
            axis.set(title=title, xlabel="speed-up of the U-Net")
            shown = [(point.speedup, point.estimate(key)) for point in those]
            found = [(x, e) for x, e in shown if e is not None]
            if not found:
                continue
            x, y = [x for x, _ in found], [e.value for _, e in found]
            low = [e.value - (e.value if e.low is None else e.low) for _, e in found]
            high = [(e.value if e.high is None else e.high) - e.value for _, e in found]
            axis.errorbar(
                x, y, yerr=[low, high], label=name, marker="o" if ours else "s", ms=6 if ours else 4, capsize=2,
                lw=1.8 if ours else 1.0, ls="-" if ours else "--",
            )  # fmt: skip
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(conditions.partition(". ")[0], fontsize=9)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    pyplot.close(figure)
    return content.getvalue()
