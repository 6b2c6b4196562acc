"""One sampling run by a pipeline's own loop and scheduler, plain or merged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tome_sampler
from tome_sampler.config import MergeConfig
from tome_sampler.models.pipeline import PipelineModel
from tome_sampler.models.run import Sampled, Settings
from tome_sampler.session import MergeSession


def sample_in_pipeline(
    model: PipelineModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
    merging: MergeConfig | Callable[[], AbstractContextManager[MergeSession]] | None = None,
    *,
    scheduler: str = "",
    negative: str = "",
    image: Tensor | None = None,
    strength: float = 0.6,
    on_step: Callable[[int, MergeSession | None], None] | None = None,
) -> Sampled:
    """As :func:`tome_sampler.models.run.sample`, through ``pipe(...)``; the settings' sampler is not used.

    Args:
        merging: a configuration, or what puts a session on the pipeline; None: plain.
        scheduler: the name of a class of diffusers, such as "DDIMScheduler"; empty: the pipeline's own.

    Raises:
        ValueError: diffusers has no such scheduler, or the pipeline cannot start from a picture.
    """
    import diffusers

    model.latent_shape(settings.size)  # which says what is wrong with a size
    pipe, options = model.pipe, {}
    if image is not None:
        try:
            pipe = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
        except ValueError:
            raise ValueError(f"diffusers has no {type(pipe).__name__} that starts from a picture") from None
        pipe.set_progress_bar_config(disable=True)
        options = {"image": (image + 1) / 2, "strength": strength}
    else:
        options = {"height": settings.size[0], "width": settings.size[1]}
    if settings.frames is not None:
        options |= {"num_frames": settings.frames}
    if "PixArt" in type(pipe).__name__:
        options |= {"use_resolution_binning": False, "clean_caption": False}  # the size and the prompt as they are
    if isinstance(merging, MergeConfig):
        merging = partial(tome_sampler.merging, pipe, merging)
    calls = [0]

    def called(module: Any, args: Any, output: Any) -> None:
        if on_step is not None:
            on_step(calls[0], session)
        calls[0] += 1

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with (
        _scheduler(pipe, scheduler),
        nullcontext() if merging is None else merging() as session,
        torch.random.fork_rng(devices=[]),
        model.module.register_forward_hook(called),
    ):
        started = time.perf_counter()
        drawn = pipe(
            prompt=list(prompts),
            negative_prompt=[negative] * len(prompts),
            num_inference_steps=settings.steps,
            guidance_scale=settings.cond_scale,
            generator=generators,
            output_type="latent",
            **options,
        )
        pictures = model.pictures(drawn.images if settings.frames is None else drawn.frames)
        seconds = time.perf_counter() - started
        return Sampled(pictures, seconds, seconds, None if session is None else session.stats.to_dict())


@contextmanager
def _scheduler(pipe: Any, name: str) -> Iterator[None]:
    """Within it, a pipeline has another scheduler, of the same noise levels."""
    import diffusers

    own = pipe.scheduler
    if name:
        kind = getattr(diffusers, name, None)
        if kind is None or not name.endswith("Scheduler"):
            known = [kind.__name__ for kind in own.compatibles]
            raise ValueError(f"scheduler is {name!r}; this model has {', '.join(sorted(known))}")
        pipe.scheduler = kind.from_config(own.config)
    try:
        yield
    finally:
        pipe.scheduler = own
