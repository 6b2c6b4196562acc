"""Where a step's time and memory go: matching, merge and unmerge, in rounds of their own, which nothing is timed by."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from tome_sampler.bench.memory import peak_of
from tome_sampler.pairing import Pairing
from tome_sampler.session import MergeSession

PARTS = ("matching", "merge", "unmerge")
_MARK = "tome_sampler: "
Around = Callable[[str], AbstractContextManager[Any]]
_FOREIGN = ("tomesd.merge", "ca_tome.merge")  # both have one function that matches and gives two that merge
_FREE = frozenset(
    """
    empty empty_like empty_strided new_empty resize_ set_ view reshape _reshape_alias as_strided expand expand_as slice
    select narrow permute transpose t unsqueeze squeeze flatten unflatten view_as split chunk detach alias unbind
    lift_fresh resolve_conj resolve_neg item _local_scalar_dense is_nonzero result_type to
    """.split()  # noqa: SIM905 - operators that launch nothing
)


@dataclass
class Cost:
    """What a step's parts cost. launches: operators that do something, or on CUDA kernels. operators: the most
    expensive ones, as (name, calls, ms). peak: bytes."""

    seconds: dict[str, float] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)
    operators: dict[str, list[tuple[str, int, float]]] = field(default_factory=dict)
    peak: int = 0


@contextmanager
def watched(around: Around) -> Iterator[None]:
    """Within it, `around(part)` is entered wherever a part of merging is at work, in our code or in a package's."""
    with ExitStack() as stack:
        for owner, name, part in (
            (MergeSession, "merge", "matching"),
            (Pairing, "merge", "merge"),
            (Pairing, "unmerge", "unmerge"),
        ):
            stack.enter_context(_replaced(owner, name, _within(getattr(owner, name), around, part)))
        for module in (sys.modules[name] for name in _FOREIGN if name in sys.modules):
            name = "bipartite_soft_matching_random2d"
            stack.enter_context(_replaced(module, name, _foreign(getattr(module, name), around)))
        yield


@contextmanager
def _replaced(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    original = vars(owner)[name]
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _within(function: Callable[..., Any], around: Around, part: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with around(part):
            return function(*args, **kwargs)

    return call


def _foreign(matching: Callable[..., Any], around: Around) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with around("matching"):
            merge, unmerge = matching(*args, **kwargs)
        return _within(merge, around, "merge"), _within(unmerge, around, "unmerge")

    return call


def seconds_in_parts(call: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """The seconds of a call that each part takes."""
    if device.type == "cuda":
        marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = defaultdict(list)

        @contextmanager
        def events(part: str) -> Iterator[None]:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            marks[part].append((first, last))

        with watched(events), torch.cuda.device(device):
            call()
        torch.cuda.synchronize(device)
        return {p: sum(a.elapsed_time(b) for a, b in marks[p]) / 1000 for p in PARTS}
    spent = dict.fromkeys(PARTS, 0.0)
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    @contextmanager
    def stopwatch(part: str) -> Iterator[None]:
        started = now()
        yield
        spent[part] += now() - started

    with watched(stopwatch):
        call()
    return spent


def profiled(call: Callable[[], Any], device: torch.device, before: int) -> tuple[Cost, int]:
    """Launches, operators and memory of a call; and the bytes it left, to be given as `before` to the next one."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with _no_chatter(), profile(activities=activities, profile_memory=not cuda) as found:
        with watched(lambda part: record_function(_MARK + part)):
            call()
        if cuda:
            torch.cuda.synchronize(device)
    cost = Cost()
    events = [e for e in found.events() if e.device_type == DeviceType.CPU]
    for part in PARTS:
        ranges = [e for e in events if e.name == _MARK + part]
        cost.launches[part] = sum(_launches(child, cuda) for e in ranges for child in e.cpu_children)
        calls: Counter[str] = Counter()
        spent: defaultdict[str, float] = defaultdict(float)
        for event in (below for e in ranges for below in _below(e)):
            calls[event.name] += 1
            spent[event.name] += _own_time(event, cuda) / 1000
        dearest = sorted(spent, key=spent.__getitem__, reverse=True)[:6]
        cost.operators[part] = [(name, calls[name], round(spent[name], 4)) for name in dearest if spent[name] > 0]
    if cuda:
        cost.peak = torch.cuda.max_memory_allocated(device)
        return cost, 0
    peak, left = peak_of(found)
    cost.peak = before + peak
    return cost, before + left


@contextmanager
def _no_chatter() -> Iterator[None]:
    """Within it, nothing reaches standard error: some versions of torch's profiler write there whatever one sets."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _below(event: Any) -> Iterator[Any]:
    for child in event.cpu_children:
        yield child
        yield from _below(child)


def _own_time(event: Any, cuda: bool) -> float:
    """Microseconds of the operator itself; older versions of torch name the device's differently."""
    if not cuda:
        return float(event.self_cpu_time_total)
    return float(
        event.self_device_time_total if hasattr(event, "self_device_time_total") else event.self_cuda_time_total
    )


def _launches(event: Any, cuda: bool) -> int:
    inner = sum(_launches(child, cuda) for child in event.cpu_children)
    if cuda:
        return inner + len(event.kernels)
    # an operator that calls others is as many as they are
    return inner or int(event.name.startswith("aten::") and event.name.removeprefix("aten::") not in _FREE)
