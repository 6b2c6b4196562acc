"""Ways to sample, as the command line names them: plain, packages as they are, presets of ours, and both together."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from tome_sampler import merging
from tome_sampler.bench.patched import Patch, restored
from tome_sampler.bench.peers import AMOUNTS, PACKAGES, check_amount, enable_deepcache, package_of
from tome_sampler.config import PRESETS, MergeConfig
from tome_sampler.models import Model
from tome_sampler.models.run import Sampled, Settings, sample
from tome_sampler.session import MergeSession
from tome_sampler.spelling import read_overrides, split_methods

DEFAULT = ",".join(
    (
        *(f"tomesd:ratio={ratio}" for ratio in (0.3, 0.5, 0.7)),
        *(f"ca-tome:r={threshold}" for threshold in (0.9, 0.7)),
        *(f"importance:ratio={ratio}" for ratio in (0.3, 0.5, 0.7)),
        *("quality:threshold=0.95,early_ratio=None", "quality:threshold=0.98", "quality", "default", "fast"),
        *("fast:ratio=0.816,threshold=None,stride=3,early_ratio=0.984,refresh=sigma_2", "plain:other_seed=1"),
    )
)
PEERS = ("tomesd", "ca-tome")  # packages that merge
CACHES = "deepcache"
"""A package that keeps what deep layers gave from step to step, alone or below a preset: "default+deepcache"."""
PAPERS = ("tomesd", "ca_tome", "importance")  # presets that reproduce them
OURS = tuple(name for name in PRESETS if name not in PAPERS)
_AMOUNTS = ("ratio", "r", "threshold", "floor", "early_ratio", "stride")
"""Fields that say how much is merged, and what allows for it."""
BASELINES = ("other_seed", "more_steps")
"""What plain may be compared with itself by: a seed so much further, or so many more steps."""


@dataclass(frozen=True)
class Drawn:
    """A batch of a method. pictures: (b 3 h w) in [-1, 1]. unet_seconds: of all of them. merged_fraction: of the
    tokens of the layers on merged levels, 0 .. 1, or None where nothing merges."""

    pictures: Tensor
    unet_seconds: float
    merged_fraction: float | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """A way to sample. label: as it was asked for. name, setting: before and after the label's colon."""

    label: str
    name: str
    setting: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether it is what all others are compared with."""
        return self.label == "plain"

    @property
    def package(self) -> str | None:
        """The package that is at work in it, if one is."""
        package = self.name.rpartition("+")[2]
        return package if package in (*PEERS, CACHES) else None

    @property
    def config(self) -> MergeConfig | None:
        """Of a preset of ours, or one that reproduces a paper; of what is below a package's cache."""
        preset = self.name.partition("+")[0]
        return None if preset in ("plain", *PEERS, CACHES) else MergeConfig.preset(preset, **self.overrides)

    @property
    def curve(self) -> str:
        """What settings of a method that differ only in how much is merged have in common."""
        rest = []
        for piece in filter(None, self.setting.split(",")):
            if piece.partition("=")[0] not in _AMOUNTS:
                rest.append(piece)
        return ":".join(filter(None, ("ours" if self.name in OURS else self.name, ",".join(rest))))

    def draw(
        self,
        model: Model,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings,
        clock: Callable[[], float],
        negative: str = "",
    ) -> Drawn:
        """A picture of each prompt, in one batch."""
        if self.name == "plain":
            seeds = [seed + _FAR * self.overrides.get("other_seed", 0) for seed in seeds]
            settings = replace(settings, steps=settings.steps + self.overrides.get("more_steps", 0))
        run = partial(sample, model, prompts, seeds, settings, negative=negative, clock=clock)
        if self.name in PEERS:
            return self._draw_by_merging_package(_patched_module(model.module), run)
        done = run(self.config) if self.package is None else self._draw_with_cache(model, run)
        stats = done.stats or {}
        return Drawn(done.pictures, done.model_seconds, stats.get("merged_fraction"), tuple(stats.get("notes", ())))

    def _draw_with_cache(self, model: Model, run: Callable[..., Sampled]) -> Sampled:
        unet: Any = _patched_module(model.module)
        # it would take the step's number from the U-Net's arguments, as pipelines give them: one timestep for a batch
        parts = SimpleNamespace(**{name: getattr(unet, name) for name in ("down_blocks", "mid_block", "up_blocks")})
        parts.forward = None
        helper: Any = None

        @contextmanager
        def applied(sigmas: list[float]) -> Iterator[MergeSession | None]:
            nonlocal helper
            with restored(unet):
                helper = enable_deepcache(parts)
                config = self.config
                with nullcontext() if config is None else merging(model.module, config, sigmas=sigmas) as session:
                    yield session

        def tell_step(number: int, session: MergeSession | None) -> None:
            del session
            helper.cur_timestep = number + 1

        return run(applied, on_step=tell_step)

    def _draw_by_merging_package(self, unet: nn.Module, run: Callable[..., Sampled]) -> Drawn:
        lengths: dict[int, list[int]] = {}  # of a layer's tokens: what attention got of them, call by call

        def apply() -> None:
            if self.name == "tomesd":
                package_of("tomesd").apply_patch(unet, **self.overrides)
            else:
                # its `apply_CA_ToMe` also replaces a whole pipeline; this is the part that merges
                steps = package_of("ca-tome").CacheConf.CONFIG_3  # its best list
                import_module("ca_tome.patch").apply_patch(unet, steps, **self.overrides)

        def tell_step(number: int) -> None:
            for module in unet.modules():
                if hasattr(module, "_cache_info"):
                    module.inference_step = number  # type: ignore[assignment]

        @contextmanager
        def applied(sigmas: list[float]) -> Iterator[None]:
            del sigmas
            with _lengths_seen(unet, lengths), Patch(unet, apply).on():
                tell_step(1)  # as its own pipeline counts
                yield

        done = run(applied, on_step=lambda i, _: tell_step(i + 2))
        return Drawn(done.pictures, done.model_seconds, _merged(lengths))


_FAR = 7_000_000_000  # from any seed that is in use


def read_methods(text: str | None) -> tuple[list[Method], list[str]]:
    """The methods of a command line, plain first, and what was left out and why.

    Args:
        text: "tomesd:ratio=0.5,default:ratio=0.7,stride=4,fast", or None: :data:`DEFAULT`, as far as its packages are
            there.

    Raises:
        ValueError: a name, a field or a value is unknown, or a method is there twice. ImportError: a package that was
            asked for is not installed.
    """
    methods, notes = [Method("plain", "plain")], []
    for label in split_methods(DEFAULT if text is None else text):
        if label in ("", "plain"):
            continue
        name, _, setting = label.partition(":")
        if name in PEERS and text is None and find_spec(PACKAGES[name][0]) is None:
            notes.append(f"{name} is not in the table: the package {PACKAGES[name][0]} is not installed")
            continue
        method = Method(label, name, setting, read_overrides(setting))
        _check(method)
        methods.append(method)
    if len({(method.name, method.setting) for method in methods}) < len(methods):
        raise ValueError(f"methods is {text!r}; it must name each one once")
    return methods, notes


def applicable(methods: Sequence[Method], model: Model, *, asked: bool) -> tuple[list[Method], list[str]]:
    """Those methods that a model can be sampled with, and what was left out and why.

    Args:
        asked: the user named them.

    Raises:
        ValueError: a package that was asked for is made for other models: it would run another one, or fail.
    """
    module = _patched_module(model.module)
    kind = type(module)
    if "UNet2DConditionModel" not in [base.__name__ for base in kind.__mro__]:
        foreign = [method for method in methods if method.package is not None]
        reason = f"made for UNet2DConditionModel, and this model is {kind.__name__}"
    else:
        foreign = [method for method in methods if method.package == CACHES and module.mid_block is None]
        reason = "made for U-Nets with a middle block, and this model has none"
    if not foreign:
        return list(methods), []
    said = f"{', '.join(method.label for method in foreign)}: {reason}"
    if asked:
        raise ValueError(f"{said}; leave them out of --methods")
    return [method for method in methods if method not in foreign], [f"Not in the table: {said}."]


def _check(method: Method) -> None:
    """It can be run, as far as that can be known without a model."""
    name, fields = method.name, list(method.overrides)
    presets = [preset for preset in PRESETS if preset not in PEERS]
    if name not in ("plain", CACHES, *PEERS, *presets, *(f"{preset}+{CACHES}" for preset in presets)):
        raise ValueError(
            f"method is {name!r}; it must be one of plain, {', '.join((*PEERS, CACHES, *presets))}, or "
            f"PRESET+{CACHES}; with fields after a colon: default:ratio=0.7"
        )
    if method.package is not None:
        package_of(method.package)
    if name in PEERS:
        module = import_module("tomesd" if name == "tomesd" else "ca_tome.patch")
        fields = [key for key in inspect.signature(module.apply_patch).parameters if key not in ("model", "compute_on")]
    elif name == CACHES:
        fields = []
    elif name == "plain":
        fields = list(BASELINES)
        for key, value in method.overrides.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{key} is {value!r} in {method.label!r}; it must be a whole number of at least 1")
    else:
        _ = method.config  # which says what is wrong with it
    for key in method.overrides:
        if key not in fields:
            raise ValueError(f"{name} has no field {key!r}; it has {', '.join(fields) or 'none'}")
    if name in AMOUNTS:
        check_amount(name, method.overrides)


def _patched_module(module: nn.Module) -> nn.Module:
    """What the packages are given: the first diffusers model in a tree that has self-attention, else the whole."""
    for part in module.modules():
        named = any(kind.__name__ == "ModelMixin" for kind in type(part).__mro__)
        if named and any(name.endswith("attn1") for name, _ in part.named_modules()):
            return part
    return module


@contextmanager
def _lengths_seen(unet: nn.Module, seen: dict[int, list[int]]) -> Iterator[None]:
    """Within it, what each transformer block gets, and what its attention gets of that, is put into `seen`."""
    whole: list[int] = []

    def block(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        whole.append(_tokens(args, kwargs))

    def attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        seen.setdefault(whole.pop(), []).append(_tokens(args, kwargs))

    with ExitStack() as stack:
        for module in unet.modules():
            inner = getattr(module, "attn1", None)
            if isinstance(inner, nn.Module):
                stack.enter_context(module.register_forward_pre_hook(block, with_kwargs=True))
                stack.enter_context(inner.register_forward_pre_hook(attention, with_kwargs=True))
        yield


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return int(next(tensors).shape[1])


def _merged(lengths: dict[int, list[int]]) -> float:
    levels = {whole: got for whole, got in lengths.items() if any(length < whole for length in got)}
    before = sum(whole * len(got) for whole, got in levels.items())
    return 1 - sum(map(sum, levels.values())) / before if before else 0.0
