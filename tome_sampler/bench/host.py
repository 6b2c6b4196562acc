"""A model as a sampler calls it: noise levels, latents, conditional and unconditional rows in one batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tome_sampler import ModelCall
from tome_sampler.bench.architectures import Architecture

GUIDANCE = 3.0
_BRANCHES = ("uncond", "cond")
_TENSORS = 40  # of the finest level's size that a U-Net call holds at once, with some to spare


class Host:
    """A model at one size and batch.

    Attributes:
        model: what is patched. noise: the run's start (batch c h w), or of clips (batch c f h w), of variance 1.
            images: in a branch, a clip's frames one by one. seen: both branches' output of a plain call,
            (cond, uncond), by its noise level: it gives importance to a step that is measured alone.
    """

    def __init__(
        self, name: str, architecture: Architecture, model: nn.Module, size: int, batch: int, seed: int = 0
    ) -> None:
        self.name, self.architecture, self.model, self.size, self.batch = name, architecture, model, size, batch
        weight = next(model.parameters())
        self.dtype, self.device = weight.dtype, weight.device
        side = size // architecture.scale
        self.latent_size = (side, side)
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same on every device
        config: Any = model.config
        frames = () if architecture.frames is None else (architecture.frames,)
        self.images = batch * math.prod(frames)
        # of what goes in some may be places, of what comes out a variance
        channels = min(config.in_channels, config.out_channels)
        self.noise = torch.randn(batch, channels, *frames, side, side, generator=generator).to(self.device)
        self.seen: dict[float, tuple[Tensor, Tensor]] = {}
        if name == "embedded":
            from tome_sampler import demo
            from tome_sampler.demo.command import PROMPTS
            from tome_sampler.demo.model import alphas_cumprod

            captions = [""] * batch + [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
            self._given = {"encoder_hidden_states": demo.encode(captions).to(self.device, self.dtype)}
            alphas = alphas_cumprod().double()
        else:
            self._given = _to(architecture.conditioning(model, self.rows, self.dtype, generator), self.device)
            power = 1.0 if architecture.linear else 0.5
            first, last = (beta**power for beta in architecture.betas)
            betas = torch.linspace(first, last, 1000).double() ** (1 / power)
            alphas = (1 - betas).cumprod(0)
        self._log_sigmas = ((1 - alphas) / alphas).sqrt().log()

    @property
    def rows(self) -> int:
        """Batch rows inside a model call, each of them a picture or a frame."""
        return len(_BRANCHES) * self.images

    def needs(self, whole_scores: bool, foreign: bool) -> float:
        """About how many bytes a call takes beside the weights. whole_scores: attention writes all of its scores at
        once. foreign: a package matches, which compares three quarters of the tokens with the rest at once."""
        config: Any = self.model.config
        tokens = self.latent_size[0] * self.latent_size[1] // getattr(config, "patch_size", 1) ** 2
        if hasattr(config, "block_out_channels"):
            channels, heads = config.block_out_channels[0], 8
        else:
            heads = config.num_attention_heads
            channels = heads * config.attention_head_dim
        item = self.noise.new_empty(0, dtype=self.dtype).element_size()
        scores = tokens**2 * max(2 * heads * whole_scores, foreign * 3 / 16)
        return float(self.rows * item * (_TENSORS * tokens * channels + scores))

    def sigmas(self, steps: int) -> list[float]:
        """A run's noise levels, those of Karras et al. (2022) with rho 7, without the 0 at their end."""
        low, high = (math.exp(float(self._log_sigmas[i])) ** (1 / 7) for i in (0, -1))
        return [(high + i / max(steps - 1, 1) * (low - high)) ** 7 for i in range(steps)]

    def timestep(self, sigma: float) -> Tensor:
        """The model's time, 0 .. 999 with fractions, of a noise level."""
        log, table = math.log(sigma), self._log_sigmas
        above = int(torch.searchsorted(table, log).clamp(1, len(table) - 1))
        low, high = float(table[above - 1]), float(table[above])
        time = above - 1 + min(max((log - low) / (high - low), 0.0), 1.0)
        return torch.tensor(time, dtype=torch.float32, device=self.device)

    def inputs(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """What the model is called with: both branches' rows, scaled to variance 1, and the timestep."""
        scaled = (x / math.sqrt(sigma**2 + 1)).to(self.dtype)
        return torch.cat([scaled] * len(_BRANCHES)), self.timestep(sigma)

    def __call__(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """The model's output for all rows: the part that is timed."""
        return self.architecture.call(self.model, *inputs, self._given)

    def describe(self, sigma: float) -> ModelCall:
        """What a session is told of the call."""
        return ModelCall.chunked(sigma, self.latent_size, _BRANCHES, self.images)

    @staticmethod
    def halves(out: Tensor) -> tuple[Tensor, Tensor]:
        """The (cond, uncond) halves of an output."""
        uncond, cond = out.chunk(2)
        return cond, uncond

    def advance(self, x: Tensor, out: Tensor, sigma: float, following: float) -> Tensor:
        """Euler's step from one noise level to the next, with guidance."""
        uncond, cond = out.float().chunk(2)
        predicted = uncond + GUIDANCE * (cond - uncond)
        if self.architecture.prediction == "v":
            denoised = x / (sigma**2 + 1) - predicted * sigma / math.sqrt(sigma**2 + 1)
            predicted = (x - denoised) / sigma
        return x + predicted * (following - sigma)


def _to(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        k: v.to(device) if isinstance(v, Tensor) else _to(v, device) if isinstance(v, dict) else v
        for k, v in given.items()
    }
