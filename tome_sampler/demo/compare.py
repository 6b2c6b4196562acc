"""The same seeds, sampled plain and merged by an unmodified k-diffusion sampler."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import tome_sampler
from tome_sampler import demo, sampling
from tome_sampler.config import MergeConfig
from tome_sampler.demo.model import LATENT_CHANNELS, LATENT_SIZE, to_picture
from tome_sampler.pairing import Pairing


@dataclass(frozen=True)
class Sample:
    """One sampled picture. picture: (3 128 128) in [-1, 1]. seconds: wall time of the whole sampling.

    Of merged runs also: stats; and from the middle of the run the importance (h w) and the pairing of the first
    merged layer, where there were any.
    """

    picture: Tensor
    seconds: float
    stats: dict[str, Any] | None = None
    importance: Tensor | None = None
    pairing: Pairing | None = None


@dataclass(frozen=True)
class Pair:
    """A prompt's pictures, from the same seed."""

    prompt: str
    seed: int
    plain: Sample
    merged: Sample


@dataclass(frozen=True)
class Comparison:
    """All prompts' pairs, and how they were made."""

    pairs: list[Pair]
    config: MergeConfig
    sampler: str
    steps: int
    cond_scale: float
    device: str


def sample(
    prompt: str,
    config: MergeConfig | None,
    *,
    steps: int,
    sampler: str,
    cond_scale: float,
    seed: int,
    device: str = "cpu",
    on_step: Any = None,
) -> Sample:
    """Sample the embedded model once; merged if there is a config.

    Raises:
        ValueError: there are fewer than 2 steps, or there is no such sampler.
    """
    if steps < 2:
        raise ValueError(f"steps is {steps}; it must be at least 2")
    known = [name.removeprefix("sample_") for name in sampling.sampler_names()]
    if sampler not in known:
        raise ValueError(f"sampler is {sampler!r}; k-diffusion has {', '.join(known)}")
    model = demo.load_model(device=device)
    wrapped = demo.denoiser(model)
    sigmas = wrapped.get_sigmas(steps)
    # drawn on the CPU, so that a seed gives the same picture on every device
    noise = torch.randn(1, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=torch.Generator().manual_seed(seed))
    conditioning = demo.encode([prompt, ""], model)
    extra_args = {"cond": conditioning[:1], "uncond": conditioning[1:], "cond_scale": cond_scale}
    function = getattr(sampling, f"sample_{sampler}")
    arguments: tuple[Any, ...] = (sigmas,)
    if sampler in ("dpm_fast", "dpm_adaptive"):  # these two choose their own sigmas
        arguments = (sigmas[-2].item(), sigmas[0].item(), *((steps,) if sampler == "dpm_fast" else ()))
    middle: dict[str, Any] = {}

    def run(session: tome_sampler.MergeSession | None) -> tuple[Tensor, float]:
        def callback(info: dict[str, Any]) -> None:
            if session is not None and info["i"] == steps // 2:
                middle["importance"] = None if session.importance is None else session.importance[0].cpu()
                middle["pairing"] = next(iter(session.pairings().values()), None)
            if on_step is not None:
                on_step()

        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of the noise that some samplers add
            started = time.perf_counter()
            latent = function(
                tome_sampler.CFGDenoiser(wrapped, session),
                noise.to(device) * sigmas[0],
                *arguments,
                extra_args=extra_args,
                callback=callback,
                disable=True,
            ).cpu()
            return to_picture(latent)[0], time.perf_counter() - started

    if config is None:
        return Sample(*run(None))
    with tome_sampler.merging(model, config, sigmas=sigmas.tolist()) as session:
        picture, seconds = run(session)
        return Sample(picture, seconds, session.stats.to_dict(), middle.get("importance"), middle.get("pairing"))


def compare(
    prompts: Sequence[str],
    config: MergeConfig,
    *,
    steps: int = 20,
    sampler: str = "dpmpp_2m",
    cond_scale: float = 3.0,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> Comparison:
    """Plain and merged pictures of each prompt, sampled in turn, so that both meet the same load of the machine."""
    settings: dict[str, Any] = {"sampler": sampler, "cond_scale": cond_scale, "device": device}
    demo.encode(prompts)  # a caption that cannot be drawn is told before anything is sampled
    for warm_up in (None, config):
        sample(prompts[0], warm_up, steps=2, seed=seed, **settings)
    pairs = []
    with tqdm(total=2 * len(prompts) * steps, desc="sampling", unit="step", disable=not progress) as bar:
        for number, prompt in enumerate(prompts):
            plain, merged = (
                sample(prompt, c, steps=steps, seed=seed + number, on_step=bar.update, **settings)
                for c in (None, config)
            )
            pairs.append(Pair(prompt, seed + number, plain, merged))
    return Comparison(pairs, config, sampler, steps, cond_scale, device)
