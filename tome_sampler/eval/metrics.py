"""How near a picture is to the plain picture of the same seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from tome_sampler.demo.report import fidelity
from tome_sampler.demo.scenes import POSITIONS, SIZES, Scene, signed_distance

_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003
_GROWN = 1.06  # the most that training scenes are drawn larger than their caption says
_SLACK = 0.025  # of the picture's width: how far they are drawn off their place, and the blur of an edge


@dataclass(frozen=True)
class Fidelity:
    """psnr: dB, at most 99. ssim, ms_ssim: at most 1, for equal pictures. gmsd: 0 for equal pictures. error_*: root
    mean square over the pixels inside and outside of what the prompt names, in parts of the range of values, or None
    where that is not known."""

    psnr: float
    ssim: float
    ms_ssim: float | None
    gmsd: float
    error_inside: float | None
    error_outside: float | None


def compare(picture: Tensor, plain: Tensor, inside: Tensor | None) -> Fidelity:
    """
    Args:
        picture, plain: (3 h w) in [-1, 1]. inside: (h w) bool, the named objects.
    """
    psnr, ssim = fidelity(picture, plain)
    a, b = ((p[None].clamp(-1, 1) + 1) / 2 for p in (picture, plain))
    within = without = None
    if inside is not None and inside.any() and not inside.all():
        squared = (a - b)[0].square().mean(0)
        within, without = (float(squared[where].mean().sqrt()) for where in (inside, ~inside))
    return Fidelity(psnr, ssim, ms_ssim(a, b), gmsd(a, b), within, without)


def ms_ssim(a: Tensor, b: Tensor) -> float | None:
    """Multi-scale SSIM of two pictures (1 3 h w) in 0 .. 1: on the published five scales from 176 pixels a side on, on
    the first four from 99, with their weights made to sum to 1; None below. What torchmetrics' windows need."""
    side = min(a.shape[-2:])
    if side < 99:
        return None
    scales = _SCALES if side >= 176 else _SCALES[:4]
    weights = tuple(weight / sum(scales) for weight in scales)
    return float(multiscale_structural_similarity_index_measure(a, b, data_range=1.0, betas=weights))


def gmsd(a: Tensor, b: Tensor) -> float:
    """Gradient magnitude similarity deviation (Xue et al. 2014) of two pictures (1 3 h w) in 0 .. 1; 0 for equal ones.

    It tells of lost detail. The only library that has it, piq, needs torchvision, so it is here, as published: Prewitt
    gradients of the half-sized grey picture, and the deviation of their similarity.
    """
    first, second = (_gradients(F.avg_pool2d((p * _GREY.to(p)).sum(1, keepdim=True), 2)) for p in (a, b))
    similarity = (2 * first * second + _C) / (first.square() + second.square() + _C)
    return float(similarity.std(correction=0))


_GREY = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
_C = 170 / 255**2
_PREWITT = torch.tensor([[1.0, 0.0, -1.0]]).expand(3, 3) / 3


def _gradients(grey: Tensor) -> Tensor:
    kernels = torch.stack([_PREWITT, _PREWITT.T])[:, None].to(grey)
    magnitude: Tensor = F.conv2d(grey, kernels, padding=1).norm(dim=1)
    return magnitude


def named_objects(scene: Scene, size: tuple[int, int]) -> Tensor:
    """Where the objects lie that a caption names (h w), bool, in pictures of a size (height, width); with a margin for
    how far scenes are drawn off their captions."""
    h, w = size
    y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
    inside = torch.zeros(h, w, dtype=torch.bool)
    for thing in scene.things:
        px, py = POSITIONS[thing.position]
        inside |= signed_distance(thing.shape, x - px, y - py, SIZES[thing.size] * _GROWN) < _SLACK
    return inside
