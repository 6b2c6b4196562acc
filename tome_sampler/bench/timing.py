"""How long one call takes: device events on CUDA, the process's own CPU time on one thread, else the wall clock."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Taken:
    """seconds: by the clock that :func:`clock_of` names. wall: by the wall clock."""

    seconds: float
    wall: float


def clock_of(device: torch.device) -> str:
    """What `seconds` are: two threads on a busy machine measure the machine, one thread's CPU time does not."""
    if device.type == "cuda":
        return "device events"
    return "process CPU time" if torch.get_num_threads() == 1 else "wall clock"


def take(call: Callable[[], T], device: torch.device) -> tuple[T, Taken]:
    """What a call gives, and how long it took. Nothing in the timed part waits for the device."""
    with _no_collection():
        return _take(call, device)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Within it, Python does not look for garbage: most of it is from putting methods on the model and taking them off
    between their turns, and whoever is timed just then would pay for all."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _take(call: Callable[[], T], device: torch.device) -> tuple[T, Taken]:
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        with torch.cuda.device(device):
            first.record()
            out = call()
            last.record()
        torch.cuda.synchronize(device)
        return out, Taken(first.elapsed_time(last) / 1000, time.perf_counter() - started)
    started, own = time.perf_counter(), time.process_time()
    out = call()
    own, wall = time.process_time() - own, time.perf_counter() - started
    return out, Taken(own if torch.get_num_threads() == 1 else wall, wall)
