"""Which tokens matter: the classifier-free guidance magnitude (Wu et al. 2025, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cfg_magnitude(cond: Tensor, uncond: Tensor) -> Tensor:
    """Importance (images h w), fp32: the channel mean of |cond - uncond|.

    Args:
        cond, uncond: model outputs (images c h w) in eps, v or denoised space; the ranking is the same in each. Of
            clips (b c frames h w): each frame is an image.

    Raises:
        ValueError: their shapes differ or are of neither kind.
    """
    if cond.shape != uncond.shape or cond.ndim not in (4, 5):
        raise ValueError(
            f"cond is {tuple(cond.shape)} and uncond {tuple(uncond.shape)}; both must be the same, (images c h w) "
            "or (b c frames h w)"
        )
    magnitude = (cond.float() - uncond.float()).abs().mean(1)
    return magnitude.flatten(0, -3)


def importance_on_grid(importance: Tensor, grid: tuple[int, int]) -> Tensor:
    """The map (images H W) area-pooled to a layer's (h, w), as (images n); entries that are not finite count as the
    mean of the others."""
    finite = torch.isfinite(importance)
    mean = importance.where(finite, 0.0).sum((1, 2), keepdim=True) / finite.sum((1, 2), keepdim=True).clamp(min=1)
    return F.adaptive_avg_pool2d(importance.where(finite, mean)[:, None], grid).flatten(1)


def importance_rank(pooled: Tensor) -> Tensor:
    """Ranks (images n) in 0 .. 1 of a layer's tokens, 1 for the most important one.

    A constant map says nothing, so it ranks all tokens 0: none is harder to merge for it.
    """
    n = pooled.shape[1]
    order = pooled.argsort(dim=1, stable=True)
    place = torch.arange(n, device=pooled.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, place).float() / max(n - 1, 1)
    low, high = pooled.aminmax(dim=1, keepdim=True)
    return rank.where(high - low > 1e-6 * high.abs(), 0.0)
