"""Text-to-image models, all used alike, by ``demo``, ``generate``, ``eval`` and ``inspect``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Usual:
    """How a model is sampled where the user does not say. size: (height, width) in pixels."""

    size: tuple[int, int]
    steps: int = 20
    sampler: str = "dpmpp_2m"
    cond_scale: float = 7.5


class Model(ABC):
    """A model that draws pictures of prompts.

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
        """(c h w) of the latents of pictures of a size (height, width) in pixels.

        Raises:
            ValueError: the model has no pictures of this size.
        """

    @abstractmethod
    def pictures(self, latents: Tensor) -> Tensor:
        """Latents (b c h w) as pictures (b 3 height width) in [-1, 1], fp32, on the CPU."""


def open_model(source: str | None = None, *, device: str = "cpu") -> Model:
    """The embedded model, which `None` and "embedded" name.

    Raises:
        ValueError: there is no such model.
    """
    if source in (None, "embedded"):
        from tome_sampler.models.embedded import EmbeddedModel

        return EmbeddedModel(device)
    raise ValueError(f"model is {source!r}; it must be 'embedded'")
