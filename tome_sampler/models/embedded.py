"""The embedded model, as :class:`tome_sampler.models.Model`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tome_sampler import demo
from tome_sampler.demo.model import LATENT_CHANNELS, LATENT_SIZE, PATCH, to_latent, to_picture
from tome_sampler.models import Model, Usual

SIZE = LATENT_SIZE * PATCH


class EmbeddedModel(Model):
    """The small trained model that ships in the package; see :mod:`tome_sampler.demo`.

    It was trained on 128 x 128 pixels. Other sizes run, which is of use for measuring, and draw what they can.
    """

    name = "embedded"
    usual = Usual(size=(SIZE, SIZE), cond_scale=3.0)

    def __init__(self, device: str = "cpu") -> None:
        self.module = self._model = demo.load_model(device=device)

    def denoiser(self) -> Any:
        return demo.denoiser(self._model)

    def condition(self, prompts: Sequence[str], size: tuple[int, int]) -> Tensor:
        del size
        return demo.encode(prompts, self._model)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        if any(side < 32 or side % 32 for side in size):
            raise ValueError(f"size is {size[0]}x{size[1]}; both sides must be multiples of 32, at least 32")
        return LATENT_CHANNELS, size[0] // PATCH, size[1] // PATCH

    def pictures(self, latents: Tensor) -> Tensor:
        return to_picture(latents.float().cpu())

    def latents(self, pictures: Tensor) -> Tensor:
        return to_latent(pictures.float()).to(next(self._model.parameters()).device)
