"""Distances between sets of pictures."""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from tome_sampler.demo.scenes import draw, random_scene
from tome_sampler.eval.features import SIZE, WIDTH, features_of

DRAWN = 1000


class _AsTheyAre(nn.Module):
    """Features instead of a network that makes them."""

    num_features = WIDTH

    def forward(self, features: Tensor) -> Tensor:
        return features


def scene_distance(features: NDArray[np.float64], reference: NDArray[np.float64] | None = None) -> float:
    """Frechet distance between two sets' features (n 32); without a reference, from 1000 drawn scenes.

    It falls as sets grow, so only sets of one size compare.
    """
    # without this, it would wait for the other processes of a launch, which have ended
    distance = FrechetInceptionDistance(feature=_AsTheyAre(), sync_on_compute=False)
    real = _drawn() if reference is None else torch.from_numpy(reference)
    distance.update(real.float(), real=True)
    distance.update(torch.from_numpy(features).float(), real=False)
    return max(float(distance.compute()), 0.0)


@lru_cache(maxsize=1)
def _drawn() -> Tensor:
    """Features of the scenes that all sets are compared with."""
    rng = random.Random("drawn scenes")
    parts = []
    for _ in range(DRAWN // 50):
        scenes = [random_scene(rng) for _ in range(50)]
        parts.append(features_of(draw(scenes, SIZE, rng)))
    return torch.cat(parts)
