"""diffusers pipelines: what a call of the denoiser is, read from the pipeline that makes it. Nothing is replaced.

A pipeline's ``__call__`` sets the scheduler's timesteps anew, so other timesteps are another run. Its properties say
how the batch is laid out in each step; where it has none, the latents do, because guidance repeats them.
"""

from __future__ import annotations

import bisect
import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tome_sampler.session import MergeSession, ModelCall

_NEVER_CLEAN = 1e-8  # the least of alphas_cumprod: with zero terminal SNR the first sigma is infinite


def is_pipeline(model: Any) -> bool:
    """Whether a model is a pipeline: it is no module, and has a scheduler with timesteps."""
    return not isinstance(model, nn.Module) and hasattr(getattr(model, "scheduler", None), "timesteps")


def writes_reference(kwargs: dict[str, Any]) -> bool:
    """Whether a U-Net, a block or a layer is called to write down tokens that another pass attends to (Zero123++'s
    ``mode="w"``): those must all be there."""
    named = kwargs.get("cross_attention_kwargs") or {}
    return kwargs.get("mode", named.get("mode")) == "w"


class PipelineCalls:
    """Says of each call of a pipeline's denoiser what it is, and gives the session both branches of what came out.

    Args:
        branches, sigmas: as in :func:`tome_sampler.merging`, where the caller knows better.
    """

    def __init__(
        self,
        pipe: Any,
        session: MergeSession,
        branches: tuple[str, ...] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        self._pipe = weakref.ref(pipe)  # it holds the U-Net, whose hooks hold this
        self._session = session
        self._told, self._sigmas = branches, sigmas
        self._timesteps: Any = None  # the run's, known by identity
        self._noise = _NoiseLevels()
        self._latent_size: tuple[int, int] | None = None
        self._checked: dict[tuple[tuple[str, ...] | None, int], tuple[str, ...] | None] = {}
        self._layout: tuple[str, ...] | None = None

    def call(self, root: nn.Module, x: Tensor, time: Any, kwargs: dict[str, Any]) -> ModelCall | None:
        """x: what the denoiser is given, (b c h w) or, with frames, (b c f h w)."""
        pipe = self._pipe()
        if pipe is None or time is None:
            return None
        if writes_reference(kwargs):
            self._layout = None  # what comes out of it is nobody's guidance
            return ModelCall(None, self._latent_size, (), ())
        t = float(time.max()) if isinstance(time, Tensor) else float(time)
        if pipe.scheduler.timesteps is not self._timesteps:
            self._start(pipe, t)
        self._latent_size = (x.shape[-2], x.shape[-1])
        self._layout = self._told or self._layout_of(pipe, root, x)
        frames = x.shape[2] if x.ndim == 5 else 1
        rows = x.shape[0] * frames
        layout = self._layout
        if layout is None or x.shape[0] % len(layout):
            self._layout = None
            return ModelCall(self._noise.sigma(t), self._latent_size, ("cond",) * rows, tuple(range(rows)))
        return ModelCall.chunked(self._noise.sigma(t), self._latent_size, layout, rows // len(layout))

    def observe(self, root: nn.Module, output: Any) -> None:
        """The denoiser has run: importance for its next call, if there were two branches."""
        out = prediction(output)
        if self._layout is None or "uncond" not in self._layout or out is None:
            return
        if out.shape[1] == 2 * (_config(root, "in_channels") or 0):  # the second half is a learned variance
            out = out[:, : out.shape[1] // 2]
        chunks = out.chunk(len(self._layout))
        cond = chunks[self._layout.index("cond")]
        uncond = chunks[len(self._layout) - 1 - self._layout[::-1].index("uncond")]
        self._session.observe(cond, uncond)

    def _start(self, pipe: Any, t: float) -> None:
        """Another run has begun, at the timestep t."""
        self._timesteps = pipe.scheduler.timesteps
        self._noise = _NoiseLevels(pipe.scheduler)
        self._checked.clear()
        told = self._sigmas
        self._session.reset(self._noise.schedule(t, getattr(pipe, "_num_timesteps", None)) if told is None else told)

    def _layout_of(self, pipe: Any, root: nn.Module, x: Tensor) -> tuple[str, ...] | None:
        """Branches of the batch, in order, or None: unknown."""
        said = _said_layout(pipe)
        # compared once a run, for each number of rows: the host waits for the device there
        key = said, x.shape[0]
        if key not in self._checked:
            channels = min(_config(root, "out_channels") or x.shape[1], x.shape[1])
            edits = (_config(root, "in_channels") or 0) > (_config(root, "out_channels") or math.inf)
            self._checked[key] = _seen_layout(pipe, said, x[:, :channels], edits)
            if said is not None and self._checked[key] is None:
                self._session.note(
                    f"{type(pipe).__name__} says that its batch is {', '.join(said)}, and it is not: each row counts "
                    "as a picture of its own, without importance"
                )
        return self._checked[key]


def prediction(output: Any) -> Tensor | None:
    """The tensor of what a denoiser returned."""
    found = output[0] if isinstance(output, (tuple, list)) and output else getattr(output, "sample", output)
    return found if isinstance(found, Tensor) and found.ndim in (4, 5) else None


def _config(root: nn.Module, name: str) -> int | None:
    """A number in the configuration of a denoiser, or of the one that a module wraps."""
    for module in root.modules():
        value = getattr(getattr(module, "config", None), name, None)
        if isinstance(value, int):
            return value
    return None


def _said_layout(pipe: Any) -> tuple[str, ...] | None:
    """What a pipeline's properties say of the step under way. They are asked in each step: callbacks may switch
    guidance off. None: it has none."""
    guided = getattr(pipe, "do_classifier_free_guidance", None)
    if guided is None:
        return None
    if guided and hasattr(pipe, "image_guidance_scale"):  # InstructPix2Pix: text and image, image alone, neither
        return ("cond", "uncond", "uncond")
    perturbed = ("cond",) * bool(getattr(pipe, "do_perturbed_attention_guidance", False))
    return ("uncond", "cond", *perturbed) if guided else ("cond", *perturbed)


def _seen_layout(pipe: Any, said: tuple[str, ...] | None, latents: Tensor, edits: bool) -> tuple[str, ...] | None:
    """The layout that the latents bear out: guidance repeats them, once for each branch. Pictures may repeat them too,
    so three branches are looked for only where there is a third: perturbed guidance, and a denoiser that edits, which
    is given a picture beside the latents."""
    if said is not None:
        return said if _repeats(latents, len(said)) else None
    perturbed = bool(getattr(pipe, "do_perturbed_attention_guidance", False))
    if (perturbed or edits) and _repeats(latents, 3):
        return ("uncond", "cond", "cond") if perturbed else ("cond", "uncond", "uncond")
    if _repeats(latents, 2):
        return ("cond", "cond") if perturbed else ("uncond", "cond")
    return ("cond",)


def _repeats(latents: Tensor, times: int) -> bool:
    if latents.shape[0] % times:
        return False
    first, *others = latents.chunk(times)
    return all(bool(torch.equal(first, other)) for other in others)


class _NoiseLevels:
    """A scheduler's timesteps as sigmas, the standard deviation of the noise over that of the signal."""

    def __init__(self, scheduler: Any = None) -> None:
        self._timesteps = [] if scheduler is None else [float(t) for t in scheduler.timesteps.tolist()]
        self._table: list[tuple[float, float]] = []
        alphas = getattr(scheduler, "alphas_cumprod", None)
        config = getattr(scheduler, "config", {})
        flows = "Flow" in type(scheduler).__name__ or bool(config.get("use_flow_sigmas"))
        if isinstance(alphas, Tensor) and not flows:
            alphas = alphas.double().clamp(_NEVER_CLEAN, 1 - _NEVER_CLEAN)
            self._table = list(enumerate(((1 - alphas) / alphas).sqrt().tolist()))
        elif isinstance(getattr(scheduler, "sigmas", None), Tensor):
            sigmas = [float(s) for s in scheduler.sigmas.tolist()][: len(self._timesteps)]
            if flows:
                sigmas = [s / max(1 - s, _NEVER_CLEAN) for s in sigmas]
            self._table = sorted(zip(self._timesteps, sigmas, strict=False))

    def sigma(self, t: float) -> float | None:
        """Of a timestep, between two of the table's along the logarithm; None where the scheduler knows none."""
        if not self._table:
            return None
        place = bisect.bisect_left(self._table, (t, -math.inf))
        (t0, s0), (t1, s1) = (self._table[min(max(i, 0), len(self._table) - 1)] for i in (place - 1, place))
        if t1 <= t0 or s0 <= 0 or s1 <= 0:
            return max(s1, _NEVER_CLEAN)
        part = min(max((t - t0) / (t1 - t0), 0.0), 1.0)
        return math.exp(math.log(s0) * (1 - part) + math.log(s1) * part)

    def schedule(self, first: float, count: int | None) -> list[float] | None:
        """The sigmas of a run that begins at a timestep and has so many of them, falling."""
        if not self._table:
            return None
        near = min(range(len(self._timesteps)), key=lambda i: abs(self._timesteps[i] - first))
        levels: list[float] = []
        for t in self._timesteps[near : None if not count else near + count]:
            sigma = self.sigma(t)
            if sigma is not None and (not levels or sigma < levels[-1]):
                levels.append(sigma)
        return levels or None
