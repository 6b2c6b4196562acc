"""One sampling run by a pipeline's own loop and scheduler, plain or merged."""

from __future__ import annotations

import copy
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
from tome_sampler.models.run import Sampled, Settings, steps_left
from tome_sampler.session import MergeSession

_DISTILLED = ("LCMScheduler", "TCDScheduler")  # diffusers says of these that nothing goes with them, and all do


def calls_of(model: PipelineModel, steps: int, scheduler: str = "", strength: float | None = None) -> int:
    """How often a run of so many steps calls the denoiser: schedulers of the second order do it twice a step. Whatever
    would keep the run from starting is said here.

    Args:
        scheduler: as below. strength: of a run that starts from a picture.

    Raises:
        ValueError: as below, or the strength leaves no step.
    """
    pipe = model.pipe if strength is None else _from_picture(model.pipe)
    with _scheduler(pipe, scheduler):
        made = copy.deepcopy(pipe.scheduler)
    made.set_timesteps(steps)
    skipped = 0 if strength is None else steps - steps_left(steps, strength, int)  # as pipelines round
    return len(made.timesteps) - skipped * int(made.order)


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
        ValueError: the scheduler is none of this model's, or the pipeline cannot start from a picture, or not with so
            little strength.
    """
    model.latent_shape(settings.size)  # which says what is wrong with a size
    pipe, options = model.pipe, {}
    if image is not None:
        steps_left(settings.steps, strength, int)  # which says what is wrong with it
        pipe = _from_picture(pipe)
        options = {"image": (image + 1) / 2, "strength": strength}
    else:
        options = {"height": settings.size[0], "width": settings.size[1]}
    if settings.frames is not None:
        options |= {"num_frames": settings.frames}
    unsaid = None if not negative else [negative] * len(prompts)  # SDXL's is zeros, and no encoded ""
    if "PixArt" in type(pipe).__name__:
        options |= {"use_resolution_binning": False, "clean_caption": False}  # the size and the prompt as they are
        unsaid = [negative] * len(prompts)
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
            negative_prompt=unsaid,
            num_inference_steps=settings.steps,
            guidance_scale=settings.cond_scale,
            generator=generators,
            output_type="latent",
            **options,
        )
        pictures = model.pictures(drawn.images if settings.frames is None else drawn.frames)
        seconds = time.perf_counter() - started
        return Sampled(pictures, seconds, seconds, None if session is None else session.stats.to_dict())


def _from_picture(pipe: Any) -> Any:
    """The pipeline of the same parts that starts from a picture."""
    import diffusers

    try:
        made = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    except ValueError:
        raise ValueError(f"diffusers has no {type(pipe).__name__} that starts from a picture") from None
    made.set_progress_bar_config(disable=True)
    return made


def _schedulers(own: Any) -> dict[str, Any]:
    """The classes that can take a scheduler's place, by their names."""
    import diffusers

    distilled = [getattr(diffusers, name) for name in _DISTILLED]
    found = (diffusers.DDIMScheduler if type(own) in distilled else type(own))._get_compatibles()
    if len(found) > 1:  # one of the usual noise levels
        found += distilled
    return {kind.__name__: kind for kind in (type(own), *found)}


@contextmanager
def _scheduler(pipe: Any, name: str) -> Iterator[None]:
    """Within it, a pipeline has another scheduler, of the same noise levels."""
    own = pipe.scheduler
    if name:
        known = _schedulers(own)
        if name not in known:
            raise ValueError(f"scheduler is {name!r}; this model has {', '.join(sorted(known))}")
        pipe.scheduler = known[name].from_config(own.config)
    try:
        yield
    finally:
        pipe.scheduler = own
