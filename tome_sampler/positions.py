"""Where a token lies, as features whose similarity is nearness: matching by position (Wu et al. 2025, PixArt)."""

from __future__ import annotations

import torch
from torch import Tensor

_ARC = 1.0


def position_features(grid: tuple[int, int], device: torch.device) -> Tensor:
    """(1 n 4), fp32: the nearer two tokens of an (h, w) grid lie, the higher is their cosine similarity.

    Rows and columns are angles on two circles, the longer side over an arc of one radian, so that the similarity is
    1 - (dy^2 + dx^2) / 4 up to the fourth power: 0.98 a quarter of the longer side apart, 0.54 from corner to corner
    of a square. A threshold on it is a distance.
    """
    h, w = grid
    step = _ARC / max(h, w)
    y = torch.arange(h, device=device, dtype=torch.float32)[:, None].expand(h, w).flatten() * step
    x = torch.arange(w, device=device, dtype=torch.float32).repeat(h) * step
    return torch.stack([y.cos(), y.sin(), x.cos(), x.sin()], -1)[None]
