"""One sampling run of a model by a k-diffusion sampler, plain or with any way of merging put on."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tome_sampler
from tome_sampler import sampling
from tome_sampler.config import MergeConfig
from tome_sampler.models import Model
from tome_sampler.session import MergeSession

Applied = Callable[[list[float]], AbstractContextManager[MergeSession | None]]
"""Given a run's noise levels, what puts a method on the model, and the session if it is one of ours."""


@dataclass(frozen=True)
class Settings:
    """How to sample: what is not the prompt, the seed or the merging. size: (height, width) in pixels. frames: of a
    clip; None: single pictures.

    Raises:
        ValueError: there are fewer than 2 steps, or k-diffusion has no such sampler.
    """

    size: tuple[int, int]
    steps: int = 20
    sampler: str = "dpmpp_2m"
    cond_scale: float = 3.0
    frames: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps is {self.steps}; it must be at least 2")
        known = [name.removeprefix("sample_") for name in sampling.sampler_names()]
        if self.sampler not in known:
            raise ValueError(f"sampler is {self.sampler!r}; k-diffusion has {', '.join(known)}")


@dataclass(frozen=True)
class Sampled:
    """What a run gave. pictures: (b 3 height width) in [-1, 1], clips (b frames 3 height width). seconds: wall time of
    sampling. model_seconds: of it, inside the model, as `clock` counts. stats: of a session, ``Stats.to_dict``; else
    None."""

    pictures: Tensor
    seconds: float
    model_seconds: float
    stats: dict[str, Any] | None


class Noise:
    """Noise of variance 1 (b c h w) or (b c frames h w), a run's start and then what some samplers add: drawn on the
    CPU, each picture's from its own seed, so that a seed gives the same picture on every device, alone and in a batch.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...]) -> None:
        self._generators, self._shape = [torch.Generator().manual_seed(seed) for seed in seeds], shape

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self._shape, generator=generator) for generator in self._generators])


def steps_left(steps: int, strength: float, whole: Callable[[float], int] = round) -> int:
    """Of a run that starts from a picture, the steps that are run. whole: makes a whole number of them.

    Raises:
        ValueError: the strength is not in 0 .. 1, or leaves none.
    """
    left = whole(steps * strength) if 0 <= strength <= 1 else 0
    if left < 1:
        raise ValueError(f"strength is {strength:g}; it must be a number from 0 to 1 that leaves one of {steps} steps")
    return left


def sample(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
    merging: MergeConfig | Applied | None = None,
    *,
    negative: str = "",
    image: Tensor | None = None,
    strength: float = 0.6,
    on_step: Callable[[int, MergeSession | None], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Sampled:
    """Sample one batch, a picture for each prompt and seed.

    Args:
        merging: a configuration, or another way to merge (:data:`Applied`); None: plain.
        image: start from these pictures (b 3 height width), in [-1, 1], or from one for all. strength: how much of the
            run is left to change them, 0 .. 1.
        on_step: is told of each step, from 0, after the model has run in it.
        clock: seconds, of which differences count for `model_seconds`; ``time.process_time`` for CPU time.

    Raises:
        ValueError: the model has no pictures of this size or takes none, or a strength leaves no step.
    """
    wrapped = model.denoiser()
    sigmas = wrapped.get_sigmas(settings.steps)
    if image is not None:
        sigmas = sigmas[-1 - steps_left(settings.steps, strength) :]
    channels, *grid = model.latent_shape(settings.size)
    frames = () if settings.frames is None else (settings.frames,)
    noise = Noise(seeds, (channels, *frames, *grid))
    start = noise().to(sigmas.device) * sigmas[0]
    if image is not None:
        picture = model.latents(image).to(start)
        start = start + (picture[:, :, None] if frames else picture)
    levels = [float(sigma) for sigma in sigmas]
    extra_args = {
        "cond": model.condition(prompts, settings.size),
        "uncond": model.condition([negative] * len(prompts), settings.size),
        "cond_scale": settings.cond_scale,
    }
    function = getattr(sampling, f"sample_{settings.sampler}")
    arguments: tuple[Any, ...] = (sigmas,)
    if settings.sampler in ("dpm_fast", "dpm_adaptive"):  # these two choose their own sigmas
        left = len(levels) - 1
        if left < 2:
            raise ValueError(f"strength is {strength:g}; for {settings.sampler} it must leave two of the steps")
        arguments = (levels[-2], levels[0], *((left,) if settings.sampler == "dpm_fast" else ()))
    added = {}
    if "noise_sampler" in inspect.signature(function).parameters:
        added["noise_sampler"] = _added(settings.sampler, noise, seeds, start, sigmas)
    if isinstance(merging, MergeConfig):
        merging = partial(_merging, model.module, merging)
    with (
        torch.no_grad(),
        nullcontext() if merging is None else merging(levels) as session,
        _stopwatch(model.module, clock) as inside,
        torch.random.fork_rng(devices=[]),
    ):

        def callback(info: dict[str, Any]) -> None:
            if on_step is not None:
                on_step(int(info["i"]), session)

        torch.manual_seed(seeds[0])  # whatever else draws
        started = time.perf_counter()
        denoiser = tome_sampler.CFGDenoiser(wrapped, session)
        latents = function(denoiser, start, *arguments, extra_args=extra_args, callback=callback, disable=True, **added)
        pictures = model.pictures(latents)
        seconds = time.perf_counter() - started
        return Sampled(pictures, seconds, sum(inside), None if session is None else session.stats.to_dict())


def _added(sampler: str, noise: Noise, seeds: Sequence[int], start: Tensor, sigmas: Tensor) -> Callable[..., Tensor]:
    """The noise that a sampler adds between two sigmas, where it would draw one for the whole batch."""
    if "sde" in sampler:  # a Brownian path, of which it asks for parts that overlap
        above = sigmas[sigmas > 0]
        path: Callable[..., Tensor] = sampling.BrownianTreeNoiseSampler(start, above.min(), above.max(), seed=[*seeds])
        return path
    return lambda *_: noise().to(start)


def _merging(module: nn.Module, config: MergeConfig, sigmas: list[float]) -> AbstractContextManager[MergeSession]:
    return tome_sampler.merging(module, config, sigmas=sigmas)


@contextmanager
def _stopwatch(module: nn.Module, clock: Callable[[], float]) -> Iterator[list[float]]:
    """Within it, a list of what each call of the module took."""
    spent: list[float] = []
    began: list[float] = []

    def wait() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return clock()

    def before(*_: Any) -> None:
        began.append(wait())

    def after(*_: Any) -> None:
        spent.append(wait() - began.pop())

    handles = [module.register_forward_pre_hook(before, prepend=True), module.register_forward_hook(after)]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()
