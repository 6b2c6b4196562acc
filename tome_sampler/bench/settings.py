"""What the user asked for, checked before anything is built."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tome_sampler.bench.architectures import ARCHITECTURES, SIZES, Architecture
from tome_sampler.bench.backends import BACKENDS
from tome_sampler.bench.chosen import Chosen, choose
from tome_sampler.bench.host import Host
from tome_sampler.bench.methods import Method
from tome_sampler.models import DTYPES

LOADED = ("sd15", "sd21", "sdxl")  # that there are checkpoints for
MOST_FRAMES = 32  # that AnimateDiff's motion modules have positions for


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The command line, checked."""

    archs: tuple[str, ...]
    checkpoint: Path | None
    sizes: tuple[int, ...]
    batches: tuple[int, ...]
    frames: int | None
    dtype: str
    device: torch.device
    backend: str
    chosen: tuple[Chosen, ...]
    bound: bool
    ratio: float
    modules: tuple[str, ...] | None
    steps: tuple[int, ...]
    repeats: int
    threads: int
    seed: int
    notes: tuple[str, ...]

    @classmethod
    def of(cls, args: argparse.Namespace) -> Settings:
        """
        Raises:
            ValueError: a value is out of its range; one line that names both. ImportError: a package is missing.
        """
        steps = tuple(n for n in _numbers("steps", args.steps, range(1001)) if n)
        if 1 in steps:
            raise ValueError("steps is 1; it must be 0, for single steps only, or from 2 to 1000")
        chosen, bound, notes = choose(args.methods, quick=args.quick, runs=bool(steps))
        archs = tuple(dict.fromkeys(one_of("arch", name, tuple(ARCHITECTURES)) for name in args.arch.split(",")))
        known = dict.fromkeys([SIZES, *(ARCHITECTURES[arch].sizes for arch in archs)])
        settings = cls(
            archs=archs,
            checkpoint=args.checkpoint,
            sizes=() if args.size is None else _numbers("size", args.size, *known),
            batches=_numbers("batch", args.batch, range(1, 65)),
            frames=None if args.frames is None else in_range("frames", args.frames, 1, MOST_FRAMES),
            dtype=one_of("dtype", args.dtype, tuple(DTYPES)),
            device=device_of(args.device),
            backend=one_of("backend", args.backend, BACKENDS),
            chosen=chosen,
            bound=bound,
            ratio=in_range("ratio", args.ratio, 0, 0.9375),
            modules=None if args.modules is None else tuple(args.modules.split(",")),
            steps=steps,
            repeats=in_range("repeats", (1 if args.quick else 5) if args.repeats is None else args.repeats, 1, 1000),
            threads=in_range("threads", args.threads, 1, 1024),
            seed=in_range("seed", args.seed, 0, 2**32 - 1),
            notes=notes,
        )
        settings._check()
        return settings

    def _check(self) -> None:
        """What goes together."""
        for name in self.archs:
            if self.checkpoint is not None and (len(self.archs) > 1 or name not in LOADED):
                raise ValueError(
                    f"arch is {','.join(self.archs)}; with a checkpoint it must be one of {', '.join(LOADED)}"
                )
            for method in self.chosen:
                method.config(self._common(name))
        known = ARCHITECTURES[self.archs[0]].sizes
        if len(self.archs) == 1 and self.sizes and not any(size in known for size in self.sizes):
            raise ValueError(
                f"size is {','.join(map(str, self.sizes))}; with arch {self.archs[0]} it must be {_range_text(known)}"
            )
        if self.frames is not None and not any(ARCHITECTURES[name].frames for name in self.archs):
            raise ValueError(f"frames is {self.frames}; it must be left out with arch {','.join(self.archs)}")
        if self.ratio > 0.75 and any(method.name == "tomesd" for method in self.chosen):
            raise ValueError(
                f"ratio is {self.ratio:g}; with tomesd, which never merges more, it must be from 0 to 0.75"
            )

    def trained(self, arch: str) -> bool:
        """Whether its weights are real, so that similarities mean something."""
        return ARCHITECTURES[arch].trained or self.checkpoint is not None

    def sizes_of(self, arch: str) -> tuple[int, ...]:
        """Those of the sizes that it has, or its usual one."""
        known = ARCHITECTURES[arch]
        return tuple(size for size in self.sizes if size in known.sizes) or (known.size,)

    def architecture(self, name: str) -> Architecture:
        """What is measured by this name here."""
        known = ARCHITECTURES[name]
        return replace(known, trained=self.trained(name), frames=known.frames and (self.frames or known.frames))

    def notes_on(self, arch: str) -> list[str]:
        """What is measured of an architecture otherwise than its name or the command line says."""
        notes = []
        if not self.trained(arch):
            notes.append(
                f"{arch} has random weights: similarities mean nothing, so presets merge {self.ratio:g} of the "
                "tokens, without a threshold; above early_sigma their early_ratio, where they have one"
            )
            configs = {
                method.label: method.config(self._common(arch)) for method in self.chosen if method.preset == "ca_tome"
            }
            without = [label for label, config in configs.items() if config and config.threshold is None]
            if without:
                notes.append(
                    f"{', '.join(without)} is our preset of that name, here without the threshold that makes it "
                    "CA-ToMe's way of merging; the package is ca-tome"
                )
        sizes = self.sizes_of(arch)
        others = ", ".join(str(size) for size in self.sizes if size not in sizes)
        if others:
            notes.append(f"{arch} cannot be measured at {others} pixels: it is at {', '.join(map(str, sizes))}")
        return notes

    def methods_on(self, host: Host) -> list[Method]:
        """The methods at work on a model, the plain one first."""
        common = self._common(host.name)
        return [Method("plain", host), *(method.on(host, self.ratio, common) for method in self.chosen)]

    def _common(self, arch: str) -> dict[str, Any]:
        """What all presets are given on an architecture."""
        given = dict(ARCHITECTURES[arch].settings)
        if not self.trained(arch):
            given |= {"threshold": None, "ratio": self.ratio}
        return given if self.modules is None else {**given, "modules": self.modules}


def one_of(option: str, given: str, allowed: tuple[str, ...]) -> str:
    """An option of a few; ValueError if it is another."""
    if given.strip() not in allowed:
        raise ValueError(f"{option} is {given!r}; it must be one of {', '.join(allowed)}")
    return given.strip()


def _numbers(option: str, given: str, *allowed: range) -> tuple[int, ...]:
    """Numbers between commas, each in one of the ranges; ValueError if one is not."""
    numbers = []
    for text in given.split(","):
        if not text.strip().isdigit() or not any(int(text) in known for known in allowed):
            raise ValueError(f"{option} is {text!r}; it must be {' or '.join(map(_range_text, allowed))}")
        numbers.append(int(text))
    return tuple(dict.fromkeys(numbers))


def in_range(option: str, value: Any, low: float, high: float) -> Any:
    """An option that is a number; ValueError if it is out of its range."""
    if not low <= value <= high:
        raise ValueError(f"{option} is {_text(value)}; it must be from {_text(low)} to {_text(high)}")
    return value


def _text(number: float) -> str:
    """A whole number whole, however large."""
    return str(number) if isinstance(number, int) else f"{number:g}"


def _range_text(known: range) -> str:
    kind = "whole number" if known.step == 1 else f"multiple of {known.step}"
    return f"a {kind} from {known[0]} to {known[-1]}"


def device_of(given: str) -> torch.device:
    """A device that is there; ValueError if it is not."""
    try:
        device = torch.device(given)
    except RuntimeError:
        raise ValueError(f"device is {given!r}; it must be cpu, cuda or cuda:NUMBER") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {given!r}; it must be cpu, cuda or cuda:NUMBER")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {given!r}; torch sees {torch.cuda.device_count()} CUDA devices here")
    return device
