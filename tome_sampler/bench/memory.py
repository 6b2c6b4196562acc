"""Is there memory enough, and how much did a step take?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType

UNITS = {
    "cpu": "peak_mb: the most that tensors took above what was there before the method's first step, counted by "
    "torch.profiler in a round of its own; weights are not in it",
    "cuda": "peak_mb: torch.cuda.max_memory_allocated of the step, weights included, in a round of its own",
}


_LESS = "; take a smaller --size or --batch, --dtype bf16, or another --arch"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had, or None where that is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def require_memory(need: float, device: torch.device, what: str, less: str = _LESS) -> None:
    """Say beforehand what will not fit.

    Raises:
        ValueError: less than `need` bytes and a tenth of them are free.
    """
    free = free_memory(device)
    if free is not None and need * 1.1 > free:
        raise ValueError(
            f"{what}: {need / 2**30:.1f} GB are needed and {free / 2**30:.1f} GB are free on {device}{less}"
        )


def peak_of(profile: Any) -> tuple[int, int]:
    """Of a CPU profile with memory: the most bytes at once, and what was left, both above the start."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = now = 0
    for event in sorted(events, key=lambda e: e.start_ns() if hasattr(e, "start_ns") else e.start_us()):
        if event.device_type() == DeviceType.CPU:
            now += event.nbytes()
            peak = max(peak, now)
    return peak, now
