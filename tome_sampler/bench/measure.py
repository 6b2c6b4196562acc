"""From settings to rows: each model is built once, and measured at each size and batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from tome_sampler.bench import report
from tome_sampler.bench.architectures import build
from tome_sampler.bench.backends import attention_on
from tome_sampler.bench.host import Host
from tome_sampler.bench.memory import require_memory
from tome_sampler.bench.rounds import Rounds
from tome_sampler.bench.rows import rows_of
from tome_sampler.bench.settings import Settings
from tome_sampler.models import DTYPES


def measure(settings: Settings, progress: bool = True) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The machine, with how it was measured, and a row for each method and kind of step: all there are so far, after
    each model, size and batch, and its single steps. What will not fit into memory is noted and left out.

    Raises:
        ValueError: nothing fits into memory, or there is no such attention kernel.
    """
    rows: list[dict[str, Any]] = []
    notes = list(settings.notes)
    with threads(settings.threads), torch.random.fork_rng(devices=_cuda(settings.device)):
        machine = report.machine(settings.device) | {
            "repeats": settings.repeats,
            "ratio": settings.ratio,
            "seed": settings.seed,
            "notes": notes,
        }
        before = report.load()
        for name in settings.archs:
            torch.manual_seed(settings.seed)
            try:
                model = build(name, DTYPES[settings.dtype], settings.device, settings.seed, settings.checkpoint)
            except ValueError as error:
                notes.append(f"not measured: {error}")
                continue
            architecture = settings.architecture(name)
            notes += [note for note in settings.notes_on(name) if note not in notes]
            for size, batch in itertools.product(settings.sizes_of(name), settings.batches):
                host = Host(name, architecture, model, size, batch, settings.seed)
                foreign = any(method.preset is None for method in settings.chosen)
                needed = host.needs(whole_scores=settings.backend == "math", foreign=foreign)
                try:
                    require_memory(needed, settings.device, f"a step of {name} at {size} pixels, batch {batch}")
                except ValueError as error:
                    notes.append(f"not measured: {error}")
                    continue
                common = {
                    "method": "",
                    "arch": name,
                    "size": size,
                    "batch": batch,
                    "frames": architecture.frames,
                    "dtype": settings.dtype,
                    "device": str(settings.device),
                    "backend": settings.backend,
                }
                with attention_on(settings.backend, model), _bar(f"{name} {size} x{batch}", progress) as bar:
                    methods = settings.methods_on(host)
                    rounds = Rounds(host, methods, repeats=settings.repeats, steps=settings.steps, bound=settings.bound)
                    for found in rounds.measure(bar):
                        left = [str(length) for length in settings.steps if length not in found.runs]
                        if left:
                            case = f"{name} at {size} pixels, batch {batch}"
                            said = f"{case}: stopped before its runs of {', '.join(left)} steps ended"
                            now = {"load": [before, report.load()], "notes": [*notes, *found.notes, said]}
                            yield machine | now, [*rows, *rows_of(found, common)]
                rows += rows_of(found, common)
                notes += [note for note in found.notes if note not in notes]
                del host, methods, rounds, found
                yield machine | {"load": [before, report.load()]}, rows
            del model
    if not rows:
        raise ValueError("; ".join(note.removeprefix("not measured: ") for note in notes if "not measured" in note))


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within it, torch computes on so many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _bar(name: str, progress: bool) -> tqdm[Any]:
    return tqdm(desc=name, unit="call", disable=not progress, smoothing=0.05)
