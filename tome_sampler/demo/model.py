"""The embedded model: a caption encoder, a text-conditional U-Net, and their k-diffusion wrapper.

The U-Net is diffusers' ``UNet2DConditionModel`` with real ``BasicTransformerBlock``s. It works on 2x2-unshuffled
pictures, so that a 128 x 128 picture has 64 x 64 tokens at its finest attention: as many as Stable Diffusion 1.5
has at 512 x 512.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from tome_sampler.demo.scenes import WORDS, parse_caption

CAPTION_TOKENS = 24
CAPTION_WIDTH = 128
PATCH = 2
LATENT_SIZE = 64
LATENT_CHANNELS = 3 * PATCH**2
SIGMA_SHIFT = 2.0
SIGMA_MIN, SIGMA_MAX = 0.03, 42.0


class CaptionEncoder(nn.Module):
    """Caption tokens (b 24 128). A word's token also carries the other words of its phrase, which binds a colour
    to its shape without a deep transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(len(WORDS) + 2, CAPTION_WIDTH)  # 0: padding, 1: start
        self.phrase = nn.Sequential(
            nn.Linear(CAPTION_WIDTH, CAPTION_WIDTH // 2), nn.SiLU(), nn.Linear(CAPTION_WIDTH // 2, CAPTION_WIDTH)
        )
        self.norm = nn.LayerNorm(CAPTION_WIDTH)

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Word ids and phrase numbers, both (b 24); phrase 0 is no phrase."""
        ids = torch.zeros(len(captions), CAPTION_TOKENS, dtype=torch.long)
        phrases = torch.zeros_like(ids)
        for row, caption in enumerate(captions):
            words = [(WORDS.index(w) + 2, n) for n, ws in enumerate(parse_caption(caption), 1) for w in ws]
            if len(words) >= CAPTION_TOKENS:
                raise ValueError(f"a caption may have {CAPTION_TOKENS - 1} known words, not {len(words)}: {caption!r}")
            ids[row, 0] = 1
            for column, (word, phrase) in enumerate(words, 1):
                ids[row, column], phrases[row, column] = word, phrase
        return ids, phrases

    def forward(self, ids: Tensor, phrases: Tensor) -> Tensor:
        words = self.word(ids)
        together = ((phrases[:, :, None] == phrases[:, None, :]) & (phrases[:, :, None] > 0)).to(words.dtype)
        out: Tensor = self.norm(words + self.phrase(together @ words))
        return out


def with_places(latents: Tensor) -> Tensor:
    """Latents (b 12 h w) with six more channels that say where each token lies. They make a picture's places easy to
    learn, and mean the same at every resolution."""
    b, _, h, w = latents.shape
    y = torch.linspace(-1 + 1 / h, 1 - 1 / h, h, device=latents.device, dtype=latents.dtype)
    x = torch.linspace(-1 + 1 / w, 1 - 1 / w, w, device=latents.device, dtype=latents.dtype)
    place = torch.stack([x[None, :].expand(h, w), y[:, None].expand(h, w)])
    turns = math.pi * place
    return torch.cat([latents, torch.cat([place, turns.cos(), turns.sin()]).expand(b, -1, -1, -1)], 1)


class SceneUNet(UNet2DConditionModel):
    """``UNet2DConditionModel`` that also sees where each token lies."""

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        return super().forward(with_places(sample), timestep, encoder_hidden_states, **kwargs)


class SceneModel(nn.Module):
    """Caption encoder and U-Net together: what the trainer trains and the weight file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.text = CaptionEncoder()
        self.unet = SceneUNet(
            in_channels=LATENT_CHANNELS + 6,
            out_channels=LATENT_CHANNELS,
            block_out_channels=(32, 48, 48, 96, 128),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
            up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=(2, 2, 2, 4, 4),  # in diffusers this is the number of heads
            time_embedding_dim=192,
            cross_attention_dim=CAPTION_WIDTH,
            norm_num_groups=16,
            sample_size=LATENT_SIZE,
        )

    def forward(self, x: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        """The velocity (b 12 h w) at a fractional timestep (b,) in 0 .. 999, for caption tokens (b 24 128)."""
        out: Tensor = self.unet(x, timestep, cond, return_dict=False)[0]
        return out

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Caption tokens (b 24 128); the empty caption is the unconditional one."""
        ids, phrases = self.text.tokenize(captions)
        device = self.text.word.weight.device
        tokens: Tensor = self.text(ids.to(device), phrases.to(device))
        return tokens


def to_latent(pictures: Tensor) -> Tensor:
    """Pictures (b 3 H W) in [-1, 1] as latents (b 12 H/2 W/2)."""
    return F.pixel_unshuffle(pictures, PATCH)


def to_picture(latents: Tensor) -> Tensor:
    """Latents (b 12 h w) as pictures (b 3 2h 2w) in [-1, 1]."""
    return F.pixel_shuffle(latents, PATCH).clamp(-1, 1)


def alphas_cumprod() -> Tensor:
    """A cosine noise schedule of 1000 steps, shifted towards noise as large pictures need (Hoogeboom et al. 2023)."""
    u = torch.linspace(0.006, 0.97, 1000, dtype=torch.float64)
    sigma = SIGMA_SHIFT * torch.tan(u * math.pi / 2)
    return (1 / (1 + sigma**2)).float()
