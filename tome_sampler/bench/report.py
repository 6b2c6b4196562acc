"""Rows as JSON, as tables to read, as a picture."""

from __future__ import annotations

import io
import itertools
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import tome_sampler
from tome_sampler.bench.memory import UNITS
from tome_sampler.bench.methods import USUAL_STEPS
from tome_sampler.bench.timing import clock_of
from tome_sampler.saving import write_whole

_LINE = 0.22  # inches of a bar and its label
_COLUMNS = (
    "method",
    "steps",
    "seconds",
    "speed-up",
    "share of bound",
    "overhead refresh / reuse",
    "merged",
    "matching / merge / unmerge, ms (of the step)",
    "launches per layer",
    "peak, MB",
)


_FILES = {"--json": "FILE", "--markdown": "FILE", "--plot": "FILE", "--checkpoint": "PATH"}
"""Options whose values are places on this machine, and what stands for them."""


def machine(device: torch.device) -> dict[str, Any]:
    """What it was measured on, by which clock and which command."""
    found: dict[str, Any] = {
        "command": command(sys.argv),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": clock_of(device),
        "memory": UNITS[device.type],
        "python": platform.python_version(),
        "tome_sampler": tome_sampler.__version__,
    }
    for package in ("torch", "diffusers", "tomesd", "ca-tome", "DeepCache", "xformers"):
        try:
            found[package.lower()] = version(package)
        except PackageNotFoundError:
            found[package.lower()] = None
    return found


def command(argv: Sequence[str]) -> str:
    """A command line without this machine's paths."""
    name, words = Path(argv[0]).name, iter(argv[1:])
    shown = ["python", "-m", "tome_sampler"] if name == "__main__.py" else [name]
    for word in words:
        option, equals, _ = word.partition("=")
        # argparse takes the first letters for an option, too
        hidden = [stand_in for file, stand_in in _FILES.items() if len(option) > 2 and file.startswith(option)]
        if hidden and not equals:
            next(words, None)
        shown += [option, *hidden] if hidden else [word]
    return shlex.join(shown)


def load() -> float | None:
    """How many processes want to run, over the last minute: above the number of threads others disturb."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def markdown(machine: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A table for each model, size and batch, with what one needs to know to read it."""
    lines = []
    for case, group in itertools.groupby(rows, lambda r: (r["arch"], r["size"], r["batch"])):
        found = list(group)
        arch, size, batch = case
        first = found[0]
        frames = f" of {first['frames']} frames" if first.get("frames") else ""
        lines += [
            f"### {arch}, {size} x {size}, batch {batch}{frames} (x 2 for guidance), {first['dtype']}, "
            f"{first['device']}, attention {first['backend']}",
            "",
            f"| {' | '.join(_COLUMNS)} |",
            "|" + "---|" * len(_COLUMNS),
            *(f"| {' | '.join(_cells(row))} |" for row in found),
            "",
        ]
    lines += [
        f"{machine['device']}, torch {machine['torch']}, {machine['threads']} threads, {machine['repeats']} rounds, "
        f"load {machine['load'][0]} to {machine['load'][1]}. seconds: {machine['clock']} of one model call, median ± "
        "interquartile range over rounds, of a whole run the mean over its steps; speed-up: to plain, paired within "
        "rounds; share of bound: zero_overhead's seconds over its own, that of the same method (of plain: the "
        "first one); overhead: the part of a step that "
        "zero_overhead does not have. A method without /refresh or /reuse is a run of so many steps as its policy "
        "mixes them: measured if it says run, else put together from single steps, each kind as often as it occurs. "
        "Where a method merges another fraction early in a run, its steps above early_sigma are /early refresh and "
        "/early reuse, and those of its limits /early and /later; a run's overheads are means over its steps that "
        "make pairs, and over those that reuse them. "
        f"{machine['memory']}.",
        "",
        *(f"- {note}" for note in machine["notes"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    def percent(key: str) -> str:
        return "" if row.get(key) is None else f"{row[key]:.1%}"

    steps = {"step": "1", "run": f"run of {row['steps']}", "composed": f"of {row['steps']}"}[row["kind"]]
    if row.get("steps_with_new_pairs") is not None:
        steps += f", {row['steps_with_new_pairs']} new"
    overheads = [percent("overhead_refresh"), percent("overhead_reuse")]
    parts, launches = "", ""
    if "seconds_merge" in row:
        parts = " / ".join(f"{row[f'seconds_{part}'] * 1000:.2f}" for part in ("matching", "merge", "unmerge"))
        parts += f" ({row['overhead_in_parts']:.2%})"
        launches = " / ".join(f"{row['launches_per_layer'][part]:.3g}" for part in ("matching", "merge", "unmerge"))
    return [
        row["method"],
        steps,
        f"{row['seconds']:.4g}" + ("" if row["kind"] == "run" else f" ± {row['seconds_iqr']:.2g}"),
        f"{row['speedup']:.3f}x",
        percent("share_of_bound"),
        " / ".join(overheads) if any(overheads) else "",
        percent("merged_fraction"),
        parts,
        launches,
        "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
    ]


def plotter() -> Any:
    """matplotlib's pyplot, which draws into files only.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import_module("matplotlib").use("Agg")
        return import_module("matplotlib.pyplot")
    except ImportError:
        raise ImportError("--plot needs matplotlib, which is not installed; pip install matplotlib") from None


def require_picture(path: Path) -> None:
    """
    Raises:
        ValueError: matplotlib writes no files of this suffix.
    """
    known = sorted(import_module("matplotlib.backend_bases").FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in known:
        raise ValueError(f"plot is {str(path)!r}; its suffix must be one of {', '.join(f'.{kind}' for kind in known)}")


def plot(pyplot: Any, rows: list[dict[str, Any]], path: Path) -> None:
    """Speed-ups: bars where there is one size; where there are more, curves over them, of whole runs if there are any.
    Of the runs that are put together, the usual one."""
    rows = [row for row in rows if row["kind"] != "composed" or row["steps"] == USUAL_STEPS]
    if len({row["size"] for row in rows}) > 1:
        rows = [row for row in rows if row["kind"] == "run"] or rows
    cases = list(dict.fromkeys((row["arch"], row["batch"]) for row in rows))
    lines = max(len({_label(row) for row in rows if (row["arch"], row["batch"]) == case}) for case in cases)
    size = 8 * len(cases), max(5.0, 1 + _LINE * lines)
    figure, grid = pyplot.subplots(1, len(cases), figsize=size, squeeze=False, layout="constrained")
    for axes, (arch, batch) in zip(grid[0], cases, strict=True):
        shown = [row for row in rows if (row["arch"], row["batch"]) == (arch, batch)]
        labels = list(dict.fromkeys(_label(row) for row in shown))
        sizes = sorted({row["size"] for row in shown})
        if len(sizes) == 1:
            speeds = {_label(row): row["speedup"] for row in shown}
            axes.bar_label(axes.barh(labels[::-1], [speeds[label] for label in labels[::-1]]), fmt="%.2f", padding=3)
            axes.margins(x=0.1, y=1 / len(labels))  # for what stands behind the bars
            axes.axvline(1, color="black", linewidth=0.8)
            axes.set_xlabel("speed-up over plain")
        else:
            bases = list(dict.fromkeys(label.partition("/")[0] for label in labels))
            for label in labels:  # a colour for each method, a line style for each of its kinds of step
                base, _, phase = label.partition("/")
                at = bases.index(base)
                colour = pyplot.get_cmap("tab20")((2 * at + at // 10) % 20)  # the strong ones first
                style = {"": "-", "reuse": ":"}.get(phase.rpartition(" ")[2], "--")
                marker = "s" if phase.startswith("early") else "o"
                points = sorted((row["size"], row["speedup"]) for row in shown if _label(row) == label)
                axes.plot(*zip(*points, strict=True), style, marker=marker, markersize=4, color=colour, label=label)
            axes.set_xticks(sizes)
            axes.set_xlabel("pixels a side")
            axes.set_ylabel("speed-up over plain")
            axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
        axes.set_title(f"{arch}, {', '.join(map(str, sizes))} pixels, batch {batch}, {shown[0]['dtype']}")
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.lower().removeprefix("."), dpi=120)
    pyplot.close(figure)
    write_whole(path, content.getvalue())


def _label(row: dict[str, Any]) -> str:
    return f"{row['method']}, run of {row['steps']}" if row["kind"] == "run" else str(row["method"])


def write_json(path: Path, machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """{"machine": ..., "results": [...]}."""
    write_whole(path, (json.dumps({"machine": machine, "results": rows}, indent=1) + "\n").encode())
