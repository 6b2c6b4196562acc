"""What the user chooses: one frozen, validated, printable object, and the named presets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

from tome_sampler.refresh import CA_TOME_CHECKPOINTS, Always, Refresh, SigmaRatio, refresh_from_dict

Destinations = Literal["grid", "cell", "pool"]
Search = Literal["global", "local"]
BatchRule = Literal["row", "max"]
Metric = Literal["attention", "block", "position"]
MODULES = ("attn1", "attn2", "ff", "block")


def _in_range(name: str, value: float, low: float, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; it must be a number from {low:g} to {high:g}")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")


def _whole(name: str, value: object, low: int, other: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} is {value!r}; it must be {other}a whole number of at least {low}")


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """How tokens are merged. The field defaults are the ``default`` preset.

    How many
        ratio: fraction of a layer's tokens that is merged away, 0 .. 1 - 1/stride**2; with a `threshold`, the most
            that is. 0 changes nothing, in no part of the run. Raising it is faster and less exact.
        threshold: cosine similarity, -1 .. 1, from which a token is merged (CA-ToMe), or None: always `ratio`.
            What it merges depends on the model's features; look at the statistics.
        floor: with a threshold, the least that is merged, 0 .. 1 (never above `ratio`), of a layer that is: with
            `min_tokens="auto"` one is left alone where no more than that is alike and it would not pay.
        early_ratio: fraction that is merged away while sigma is above `early_sigma` and the picture is still mostly
            noise, whatever the threshold; 0 .. 0.99, or None: as later. Cells are then as large as it needs.
        early_sigma: where that ends, > 0. Noise levels are those of k-diffusion, in multiples of the latent's scale.
        batch_rule: with a threshold, "row": every image its own count, the same alone or in a batch; "max": the
            largest count of the batch for all (CA-ToMe as published).

    Which
        stride: destinations are one token per stride x stride cell, >= 2. 2 can merge 0.75, 4 can merge 0.9375.
        destinations: "grid": a random token of each cell (ToMe-SD; top-left if not `random`); "cell": the most
            important token of each cell; "pool": random among the most important ones, and what lies outside the
            pool is always merged (importance-based merging).
        random: let `seed` draw the token in "grid" cells, anew at each refresh. False: the cell's first token.
        pool: size of the "pool", in multiples of the tokens that are kept, >= 0.25.
        importance: how much an important token must be more similar to be merged, 0 .. 2: at the rank r in 0 .. 1
            its similarity counts as similarity - importance * r.
        protect: fraction of the tokens, the most important ones, that are never merged, 0 .. 1.
        levels: on how many of the finest attention levels that the model has, >= 1.
        modules: which of "attn1", "attn2", "ff" run on merged tokens, each merged by itself; or "block": whole
            transformer blocks, merged once, which give every token what its group's mean has gained.
        early_modules: which of them do in the run's early part, if there is one; None: as later.
        min_tokens: layers with fewer tokens are left alone. "auto": those where it would not pay on this kind of
            device, see :mod:`tome_sampler.gate`; with a threshold also, until new pairs are due, those of whose tokens
            too few pass it. 0: none is.

    Matching
        search: "global": among all destinations; "local": among those at most `neighbourhood` cells away.
        neighbourhood: cells in each direction for the local search, >= 1.
        metric: "attention": similarity of what the attention layer gets; "block": of what its block gets, before
            the norm (ToMe-SD); "position": nearness in the picture, whatever the features (Wu et al. 2025, PixArt).
        share_branches: match on the cond row and use the pairs for the uncond row too. It halves the matching.
        share_layers: all layers of a level use the pairs of the first one that needed them.

    When
        refresh: when cached pairs are made anew; see :mod:`tome_sampler.refresh`.
        start, end: merge from this to this fraction of the run, 0 .. 1.
        prune_until: up to this fraction of the run destinations come from the grid, and sources are dropped, not
            averaged (the paper's "prune then merge").

    Attention
        proportional: a merged key counts for as many tokens as it stands for (Bolya et al. 2023, ToMe for ViT).

    seed: of everything random here. The sampler's generators are never touched.

    Raises:
        ValueError: a value is outside its range, or a combination cannot work; one line that names both.
    """

    ratio: float = 0.5
    threshold: float | None = 0.9
    floor: float = 0.2
    early_ratio: float | None = 0.75
    early_sigma: float = 3.0
    batch_rule: BatchRule = "row"
    stride: int = 2
    destinations: Destinations = "cell"
    random: bool = False
    pool: float = 1.4
    importance: float = 0.1
    protect: float = 0.0
    levels: int = 1
    modules: tuple[str, ...] = ("attn1",)
    early_modules: tuple[str, ...] | None = None
    min_tokens: int | Literal["auto"] = "auto"
    search: Search = "global"
    neighbourhood: int = 1
    metric: Metric = "attention"
    share_branches: bool = True
    share_layers: bool = False
    refresh: Refresh = SigmaRatio(4.0)
    start: float = 0.0
    end: float = 1.0
    prune_until: float = 0.0
    proportional: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _whole("stride", self.stride, 2)
        most = 1 - 1 / self.stride**2
        number = isinstance(self.ratio, (int, float)) and not isinstance(self.ratio, bool)
        if not number or not 0 <= self.ratio <= most:
            raise ValueError(
                f"ratio is {self.ratio!r}; it must be a number from 0 to {most:g}, the most that one destination per "
                f"{self.stride}x{self.stride} cell can give (a larger stride can give more)"
            )
        if self.threshold is not None:
            _in_range("threshold", self.threshold, -1, 1)
        for name in ("floor", "protect", "start", "end", "prune_until"):
            _in_range(name, getattr(self, name), 0, 1)
        if self.start > self.end:
            raise ValueError(f"start is {self.start:g} and end is {self.end:g}; start must not be after end")
        if self.early_ratio is not None:
            _in_range("early_ratio", self.early_ratio, 0, 0.99)
        positive = isinstance(self.early_sigma, (int, float)) and not isinstance(self.early_sigma, bool)
        if not positive or not 0 < self.early_sigma < math.inf:
            raise ValueError(f"early_sigma is {self.early_sigma!r}; it must be a finite number above 0")
        _in_range("pool", self.pool, 0.25, 100)
        _in_range("importance", self.importance, 0, 2)
        _one_of("batch_rule", self.batch_rule, ("row", "max"))
        _one_of("destinations", self.destinations, ("grid", "cell", "pool"))
        _one_of("search", self.search, ("global", "local"))
        _one_of("metric", self.metric, ("attention", "block", "position"))
        for name, low in (("levels", 1), ("neighbourhood", 1)):
            _whole(name, getattr(self, name), low)
        if self.min_tokens != "auto":
            _whole("min_tokens", self.min_tokens, 0, "'auto' or ")
        _whole("seed", self.seed, 0)
        for name in ("random", "share_branches", "share_layers", "proportional"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        object.__setattr__(self, "modules", _modules("modules", self.modules))
        if self.early_modules is not None:
            object.__setattr__(self, "early_modules", _modules("early_modules", self.early_modules))
        if self.destinations == "pool" and self.search == "local":
            raise ValueError("search is 'local', which needs one destination per cell; destinations 'pool' has none")
        if not isinstance(self.refresh, Refresh):
            raise ValueError(f"refresh is {self.refresh!r}; it must be a policy of tome_sampler.refresh")

    @cached_property
    def early(self) -> MergeConfig | None:
        """What holds while sigma is above `early_sigma`, if that is something else: a fixed ratio, the smallest cells
        that can give it, and the early modules."""
        if self.early_ratio is None or self.ratio <= 0:
            return None
        stride = next(s for s in range(2, 11) if self.early_ratio <= 1 - 1 / s**2)
        return self.with_(
            ratio=self.early_ratio,
            threshold=None,
            stride=stride,
            modules=self.early_modules or self.modules,
            early_ratio=None,
            early_modules=None,
        )

    @cached_property
    def all_modules(self) -> frozenset[str]:
        """The modules that run on merged tokens in any part of a run."""
        return frozenset(self.modules if self.early is None else (*self.modules, *self.early.modules))

    def is_early(self, sigma: float) -> bool:
        """Whether a noise level lies in a run's early part, where :attr:`early` holds."""
        return self.early is not None and sigma > self.early_sigma

    @classmethod
    def preset(cls, name: str, /, **overrides: Any) -> MergeConfig:
        """A named configuration, with some fields replaced.

        ``tomesd``, ``ca_tome`` and ``importance`` reproduce the published methods; ``quality``, ``balanced``,
        ``fast`` and ``default`` (which is balanced) are ours.

        Raises:
            ValueError: the name, or a field's value, is unknown or out of range.
        """
        if name not in PRESETS:
            raise ValueError(f"preset is {name!r}; it must be one of {', '.join(PRESETS)}")
        return PRESETS[name].with_(**overrides)

    def with_(self, /, **overrides: Any) -> MergeConfig:
        """A copy with some fields replaced, validated again."""
        _known(overrides)
        return replace(self, **overrides)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can carry; :meth:`from_dict` gives an equal configuration back."""
        lists = {
            name: None if value is None else list(value)
            for name, value in (("modules", self.modules), ("early_modules", self.early_modules))
        }
        return {**asdict(self), **lists, "refresh": self.refresh.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MergeConfig:
        """The configuration that :meth:`to_dict` wrote; missing fields take their defaults.

        Raises:
            ValueError: a field is unknown, or its value is out of range.
        """
        _known(data)
        values = dict(data)
        if isinstance(values.get("refresh"), Mapping):
            values["refresh"] = refresh_from_dict(values["refresh"])
        return cls(**values)


def _modules(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, (tuple, list)) or not value:
        raise ValueError(f"{name} is {value!r}; it must be a list of at least one of {', '.join(MODULES)}")
    for module in value:
        _one_of(name, module, MODULES)
    if len(set(value)) < len(value):
        raise ValueError(f"{name} is {value!r}; it must name each one once")
    if "block" in value and len(value) > 1:
        raise ValueError(f"{name} is {value!r}; 'block' holds the others already and must be the only one")
    return tuple(value)


def _known(names: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(MergeConfig)]
    for name in names:
        if name not in known:
            raise ValueError(f"MergeConfig has no field {name!r}; it has {', '.join(known)}")


_PAPERS: dict[str, Any] = {
    "metric": "block",
    "share_branches": False,
    "proportional": False,
    "importance": 0.0,
    "floor": 0.0,
    "early_ratio": None,
    "min_tokens": 0,
    "refresh": Always(),
}
PRESETS: dict[str, MergeConfig] = {
    # ToMe-SD (Bolya & Hoffman 2023): a fixed ratio, a random destination in each 2x2 cell.
    "tomesd": MergeConfig(ratio=0.5, threshold=None, destinations="grid", random=True, **_PAPERS),
    # CA-ToMe (Saghatchian et al. 2025): a threshold, the batch's largest count, pairs kept between its best list.
    "ca_tome": MergeConfig(
        **{**_PAPERS, "refresh": CA_TOME_CHECKPOINTS["config_3"]},
        ratio=0.75,
        threshold=0.7,
        batch_rule="max",
        destinations="grid",
        random=True,
    ),
    # Importance-based merging (Wu et al. 2025), with the schedule it uses for Stable Diffusion 2 in 50 steps.
    "importance": MergeConfig(
        ratio=0.7, threshold=None, destinations="pool", random=True, prune_until=2 / 50, **_PAPERS
    ),
    "quality": MergeConfig(floor=0.0, early_ratio=0.5, refresh=SigmaRatio(3.0)),
    "balanced": MergeConfig(),
    "fast": MergeConfig(ratio=0.75, threshold=0.8, floor=0.6, early_ratio=0.9),
    "default": MergeConfig(),
}
"""The named presets. Ours are points on the measured curve; the README's table says which."""
