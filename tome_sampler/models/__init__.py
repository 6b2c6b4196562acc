"""Text-to-image models, all used alike, by ``demo``, ``generate``, ``eval`` and ``inspect``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Usual:
    """How a model is sampled where the user does not say. size: (height, width) in pixels. frames: of a clip, of at
    most most_frames; None: it draws single pictures."""

    size: tuple[int, int]
    steps: int = 20
    sampler: str = "dpmpp_2m"
    cond_scale: float = 7.5
    frames: int | None = None
    most_frames: int | None = None


class Model(ABC):
    """A model that draws pictures of prompts, or clips: then latents are (b c frames h w) where (b c h w) is said
    below, and what it draws is (b frames 3 height width).

    Attributes:
        name: for people. module: the U-Net, or the module tree that holds it: what merging works on. usual: how it is
            sampled by default.
    """

    name: str
    module: nn.Module
    usual: Usual

    @abstractmethod
    def denoiser(self) -> Any:
        """A k-diffusion denoiser, called as ``denoiser(x, sigma, cond=...)``, with ``get_sigmas(steps)``."""

    @abstractmethod
    def condition(self, prompts: Sequence[str], size: tuple[int, int]) -> Any:
        """Conditioning of as many rows as there are prompts; "" is the unconditional one.

        Raises:
            ValueError: a prompt cannot be encoded.
        """

    @abstractmethod
    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(c h w) of the latents of a picture, or of a frame, of a size (height, width) in pixels.

        Raises:
            ValueError: the model has no pictures of this size.
        """

    @abstractmethod
    def pictures(self, latents: Tensor) -> Tensor:
        """Latents (b c h w) as pictures (b 3 height width) in [-1, 1], fp32, on the CPU."""

    def latents(self, pictures: Tensor) -> Tensor:
        """Pictures (b 3 height width) in [-1, 1] as latents (b c h w), fp32, on the model's device; of
        :meth:`pictures` the inverse, as far as there is one.

        Raises:
            ValueError: the model takes no pictures.
        """
        raise ValueError(f"{self.name} takes no pictures, so nothing can start from one")


def open_model(
    source: str | None = None,
    *,
    device: str = "cpu",
    dtype: str = "fp32",
    config: str | None = None,
    allow_pickle: bool = False,
    motion: str | None = None,
) -> Model:
    """The embedded model, which `None` and "embedded" name, or a checkpoint of Stable Diffusion 1.x, 2.x, SDXL, PixArt
    or AnimateDiff: a safetensors file, a diffusers folder, or its name on the hub.

    Args:
        dtype: "fp32", "fp16" or "bf16", of a checkpoint's weights.
        config, allow_pickle, motion: see :func:`tome_sampler.models.checkpoints.load_pipeline`.

    Raises:
        ValueError: there is no such model, it cannot be read, or it is of another kind.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for a device
        raise ValueError(f"device is {device!r}: {str(error).partition(chr(10))[0]}") from None
    if source in (None, "embedded"):
        if dtype != "fp32":
            raise ValueError(f"dtype is {dtype!r}; the embedded model runs in 'fp32'")
        if config is not None:
            raise ValueError(f"--model-config is {config!r}; it is for a single file, and not for the embedded model")
        if motion is not None:
            raise ValueError(f"motion is {motion!r}; the embedded model draws single pictures")
        from tome_sampler.models.embedded import EmbeddedModel

        return EmbeddedModel(device)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    from tome_sampler.models.checkpoints import load_pipeline
    from tome_sampler.models.pipeline import PipelineModel

    assert source is not None
    pipe = load_pipeline(
        source, dtype=DTYPES[dtype], device=device, config=config, allow_pickle=allow_pickle, motion=motion
    )
    return PipelineModel(pipe, source)
