"""Methods as the command line names them: "plain,tomesd,default:ratio=0.7,stride=4,default+deepcache"."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from tome_sampler.bench.host import Host
from tome_sampler.bench.methods import USUAL_STEPS, Merged, Method, Stacked
from tome_sampler.bench.peers import (
    AMOUNTS,
    PACKAGES,
    CaTome,
    DeepCache,
    HyperTile,
    TomeSd,
    check_amount,
    package_of,
    threshold_for,
)
from tome_sampler.config import PRESETS, MergeConfig
from tome_sampler.spelling import read_overrides, split_methods

LIMITS = ("plain", "bound", "zero_overhead")
MERGING = ("tomesd", "ca-tome")  # packages that shorten sequences, so that there are limits for them
OURS = tuple(name for name in PRESETS if name not in PACKAGES)
EVERYTHING = (*LIMITS, "tomesd", "ca-tome", "ca_tome", "default", "deepcache", "hypertile", "default+deepcache")
QUICK = (*LIMITS, "tomesd", "default")


@dataclass(frozen=True)
class Chosen:
    """A method as it was asked for. label: all of it. name: without its overrides."""

    label: str
    name: str
    overrides: dict[str, Any]

    @property
    def preset(self) -> str | None:
        """The preset of ours that it runs, if it does."""
        above = self.name.partition("+")[0]
        return above if above in OURS else None

    @property
    def has_limits(self) -> bool:
        """Whether bound and zero_overhead are measured for it."""
        return self.name in (*OURS, *MERGING)

    def config(self, common: dict[str, Any]) -> MergeConfig | None:
        """The configuration of one of our presets, with what all of them are given here."""
        return None if self.preset is None else MergeConfig.preset(self.preset, **{**common, **self.overrides})

    def on(self, host: Host, ratio: float, common: dict[str, Any]) -> Method:
        """The method at work on a model."""
        config, arguments = self.config(common), dict(self.overrides)
        if self.name == "tomesd":
            return TomeSd(self.label, host, {"ratio": ratio, **arguments})
        if self.name == "ca-tome":
            if "r" not in arguments and not host.architecture.trained and host.architecture.is_plain_unet:
                arguments["r"] = _threshold(ratio, host)
            return CaTome(self.label, host, arguments)
        if self.name == "hypertile":
            return HyperTile(self.name, host)
        if config is None:
            return DeepCache(self.name, host)
        merged = Merged(self.label, host, config)
        return Stacked(self.label, DeepCache("deepcache", host), merged) if "+" in self.name else merged


@torch.no_grad()
def _threshold(ratio: float, host: Host) -> float:
    sigma = host.sigmas(USUAL_STEPS)[USUAL_STEPS // 2]
    return threshold_for(ratio, host, host.inputs(host.noise * sigma, sigma))


def choose(given: str | None, *, quick: bool, runs: bool) -> tuple[tuple[Chosen, ...], bool, tuple[str, ...]]:
    """The methods but for the limits, whether the bound is among those asked for, and what was left out and why.

    Args:
        given: the command line's, or None: all that can be had. quick: fewer of them. runs: there will be whole runs.

    Raises:
        ValueError: a name is unknown, or is there twice, or there are limits and nothing that they are of.
        ImportError: a package that was asked for is not installed.
    """
    labels = split_methods(given) if given is not None else list(QUICK if quick else EVERYTHING)
    chosen, notes = [], []
    for label in labels:
        name, _, rest = label.partition(":")
        _known(name)
        if rest and name in (*LIMITS, "deepcache", "hypertile"):
            raise ValueError(f"method is {label!r}; {name} takes no overrides")
        package = name.rpartition("+")[2]
        if package in PACKAGES:
            if given is None and find_spec(PACKAGES[package][0]) is None:
                notes.append(f"{name} is not in the table: the package {PACKAGES[package][0]} was not installed")
                continue
            package_of(package)
        if package == "deepcache" and not runs:
            notes.append(
                f"{name} is not in the table: it works from step to step, and there were no whole runs (--steps)"
            )
            continue
        if name in LIMITS:
            continue
        overrides = read_overrides(rest)
        if name in AMOUNTS:
            check_amount(name, overrides)
        chosen.append(Chosen(label, name, overrides))
    if len(set(labels)) < len(labels):
        raise ValueError(f"methods is {given!r}; it must name each one once")
    limits = [label for label in labels if label in LIMITS[1:]]
    if limits and not any(method.has_limits for method in chosen):
        raise ValueError(
            f"methods is {given!r}; with {' and '.join(limits)} it must name a method that merges, e.g. default: they "
            "are limits of one"
        )
    return tuple(chosen), "bound" in labels, tuple(notes)


def _known(name: str) -> None:
    known = (*LIMITS, *PACKAGES, *OURS)
    above, _, below = name.partition("+")
    if name not in known and not (below == "deepcache" and above in OURS):
        raise ValueError(
            f"method is {name!r}; it must be one of {', '.join(known)}, or PRESET+deepcache; with fields after a "
            "colon: default:ratio=0.7"
        )
