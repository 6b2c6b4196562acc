"""Other people's packages, as they are: tomesd, ca-tome, DeepCache, HyperTile. Imported when they are asked for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tome_sampler.bench.host import Host
from tome_sampler.bench.methods import Inputs, Method
from tome_sampler.bench.patched import Patch, restored
from tome_sampler.matching import global_match, grid_dst

PACKAGES = {
    # method: the module, and how to get it without the dependencies that would replace an installed torch
    "tomesd": ("tomesd", "pip install --no-deps tomesd"),
    "ca-tome": ("ca_tome", "pip install --no-deps ca-tome"),
    "deepcache": ("DeepCache", "pip install --no-deps DeepCache"),
    "hypertile": ("hyper_tile", "pip install --no-deps git+https://github.com/tfernd/HyperTile"),
}


def package_of(method: str) -> Any:
    """The imported package of a method.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    module, command = PACKAGES[method]
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{method} needs the package {module}, which cannot be imported ({error}); {command}, or leave {method} "
            "out of --methods"
        ) from None


AMOUNTS = {
    # a package's argument that says how much is merged, and its range: of four tokens one is a destination
    "tomesd": ("ratio", 0.0, 0.75),
    "ca-tome": ("r", -1.0, 1.0),
}


def check_amount(method: str, arguments: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: how much a package is to merge is no number, or none that it would merge.
    """
    name, low, high = AMOUNTS[method]
    value = arguments.get(name, low)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} of {method} is {value!r}; it must be a number from {low:g} to {high:g}")


class _Peer(Method):
    foreign = True

    def __init__(self, name: str, host: Host) -> None:
        super().__init__(name, host)
        self.package = package_of(name)
        self._patch = Patch(host.model, self.apply)

    def apply(self) -> None:
        """Patch the model as the package's users do."""

    def on(self) -> AbstractContextManager[None]:
        self.require_unet()
        return self._patch.on()

    def require_unet(self) -> None:
        """Of other models these packages take frames for the picture's height, and replace blocks by what leaves out
        PixArt's adaLN: another model, and often without an error.

        Raises:
            TypeError: it is such a model.
        """
        if not self.host.architecture.is_plain_unet:
            raise TypeError(f"it is made for UNet2DConditionModel, and this is {self.host.architecture.model}")

    def restart(self, sigmas: list[float]) -> None:
        del sigmas
        self._patch.forget()

    def release(self) -> None:
        self._patch.forget()


class TomeSd(_Peer):
    """tomesd: new pairs at each step."""

    merges = True

    def __init__(self, name: str, host: Host, arguments: dict[str, Any]) -> None:
        super().__init__("tomesd", host)
        self.name, self._arguments = name, arguments

    def apply(self) -> None:
        self.package.apply_patch(self.host.model, **self._arguments)

    def restart(self, sigmas: list[float]) -> None:
        super().restart(sigmas)
        self._kinds = ["refresh"] * len(sigmas)

    def kinds_in_run(self) -> list[str]:
        return self._kinds


class CaTome(_Peer):
    """ca-tome: pairs by a threshold, kept between the steps of its best list, which count from 1."""

    merges, varies, phases = True, True, ("refresh", "reuse")

    def __init__(self, name: str, host: Host, arguments: dict[str, Any]) -> None:
        super().__init__("ca-tome", host)
        self.name, self._arguments = name, arguments
        self._list: list[int] = self.package.CacheConf.CONFIG_3
        self._alone: int | None = None

    def apply(self) -> None:
        # its `apply_CA_ToMe` also replaces a whole pipeline; this is the part that merges
        import_module("ca_tome.patch").apply_patch(self.host.model, self._list, **self._arguments)

    def begin(self, phase: str, sigma: float) -> None:
        del sigma
        outside = next(step for step in range(1, 99) if step not in self._list)
        self._alone = self._list[0] if phase == "refresh" else outside

    def restart(self, sigmas: list[float]) -> None:
        super().restart(sigmas)
        self._alone, self._kinds = None, self.phases_in(sigmas)

    def kinds_in_run(self) -> list[str]:
        return self._kinds

    def call(self, inputs: Inputs, sigma: float, step: int) -> Tensor:
        for module in self.host.model.modules():
            if hasattr(module, "_cache_info"):
                module.inference_step = step + 1 if self._alone is None else self._alone  # type: ignore[assignment]
        return super().call(inputs, sigma, step)

    def phases_in(self, sigmas: list[float]) -> list[str]:
        return ["refresh" if step == 1 or step in self._list else "reuse" for step in range(1, len(sigmas) + 1)]


def threshold_for(ratio: float, host: Host, inputs: Inputs) -> float:
    """The threshold at which ca-tome merges about `ratio` of the tokens of a model whose similarities mean nothing."""
    scores: list[Tensor] = []
    finest = host.latent_size[0] * host.latent_size[1]
    blocks = [m for m in host.model.modules() if isinstance(getattr(m, "attn1", None), nn.Module)]

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args[0].shape[1] == finest:  # where ca-tome merges
            dst = grid_dst(host.latent_size, 2, args[0].device, None)
            score, _ = global_match(args[0], dst)
            scores.append(score[score > -2].flatten())

    hooks = [block.register_forward_pre_hook(see) for block in blocks]
    try:
        host(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not scores:
        return 0.7  # its default; there is nothing for it to merge
    found = torch.cat(scores).sort(descending=True).values
    return float(found[min(int(len(found) * ratio / 0.75), len(found) - 1)])


def enable_deepcache(unet: Any, scheduler: Any = None) -> Any:
    """DeepCache on a U-Net: every third step whole, the finest block alone in the others.

    Returns:
        Its helper, which reads a step's number off the scheduler; without one it is told it as ``cur_timestep``.
    """
    helper = package_of("deepcache").DeepCacheSDHelper(pipe=SimpleNamespace(unet=unet, scheduler=scheduler))
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()
    return helper


class DeepCache(_Peer):
    """DeepCache: the deep part of the U-Net every third step only. Whole runs, since it lives from step to step."""

    phases = ()

    def restart(self, sigmas: list[float]) -> None:
        super().restart(sigmas)
        self._timesteps = [float(self.host.timestep(sigma)) for sigma in sigmas]

    def apply(self) -> None:
        enable_deepcache(self.host.model, SimpleNamespace(timesteps=self._timesteps))


class HyperTile(_Peer):
    """HyperTile: the finest self-attention inside tiles of 256 pixels."""

    @contextmanager
    def on(self) -> Iterator[None]:
        self.require_unet()
        split = self.package.split_attention
        pixels = self.host.latent_size[0] * 8  # what it takes for the picture's size
        known = inspect.signature(split).parameters
        size = {"height": pixels, "width": pixels} if "height" in known else {"aspect_ratio": 1.0}
        with restored(self.host.model), split(self.host.model, **size, tile_size=256):
            yield
