"""Pictures of what merging looked at and did: plain tensors (3 h w) in [-1, 1]."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


def to_bytes(picture: Tensor) -> Tensor:
    """A picture (3 h w) in [-1, 1] as bytes (h w 3), as image files have them."""
    return rearrange(((picture.clamp(-1, 1) + 1) * 127.5).round().byte(), "c h w -> h w c").contiguous()


def heat_map(importance: Tensor) -> Tensor:
    """A map (h w) as a picture (3 h w): black, through red and yellow, to white."""
    low, high = importance.min(), importance.max()
    level = ((importance - low) / (high - low).clamp(min=1e-12)) * 3
    return torch.stack([level, level - 1, level - 2]).clamp(0, 1) * 2 - 1


def group_map(picture: Tensor, target: Tensor, grid: tuple[int, int], size: int = 256) -> Tensor:
    """What was merged into what, about `size` wide or high: each group in the mean colour of its part of the picture,
    dark lines between groups. A wide plain area is one group; fine mesh is tokens that were kept.

    Args:
        picture: (3 H W) in [-1, 1], any size.
        target: (tokens) the token that each token is represented by, see ``Pairing.target``.
        grid: (h, w) of the tokens.
    """
    h, w = grid
    tokens = rearrange(F.adaptive_avg_pool2d(picture[None], grid), "1 c h w -> (h w) c")
    total = torch.zeros_like(tokens).index_add_(0, target, tokens)
    count = tokens.new_zeros(h * w).index_add_(0, target, tokens.new_ones(h * w))
    grouped = rearrange((total / count.clamp(min=1)[:, None])[target], "(h w) c -> c h w", h=h)
    scale = max(size // max(h, w), 1)
    grouped = grouped.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    group = target.view(h, w).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    edge = torch.zeros_like(group, dtype=torch.bool)
    edge[1:] |= group[1:] != group[:-1]
    edge[:, 1:] |= group[:, 1:] != group[:, :-1]
    return torch.where(edge, grouped * 0.55 - 0.45, grouped)
