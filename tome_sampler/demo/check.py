"""Does a picture show what its caption says? A check without a model: known colours, drawn templates, known places."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from tome_sampler.demo.scenes import COLOURS, POSITIONS, SHAPES, SIZES, Scene, Thing, rgb, signed_distance

SIZE = 128
_CELL = 46  # pixels of the window that is looked at: a ninth of the picture and a little more
_RADII = tuple(0.075 + 0.0085 * i for i in range(12))
_LEAST_AREA = 90  # pixels; the smallest object that is drawn has about 230
_LEAST_OVERLAP = 0.55


@dataclass(frozen=True)
class Verdict:
    """What is right about one object. Where nothing lies at its place, nothing is."""

    colour: bool
    shape: bool
    size: bool
    position: bool


def check_scene(picture: Tensor, scene: Scene) -> list[Verdict]:
    """A verdict for each object of the scene.

    A pixel belongs to an object when it is nearer to one of the seven object colours than to the background, which
    is read off the ninths of the picture where no object should be. The position is right if the object's ninth
    holds enough such pixels, centred within a third of it; the colour is what most of them are; shape and size are
    those of the drawn template that overlaps best (intersection over union, at least 0.55).

    Args:
        picture: (3 128 128) in [-1, 1].
    """
    if picture.shape != (3, SIZE, SIZE):
        raise ValueError(f"picture is {tuple(picture.shape)}; it must be (3 {SIZE} {SIZE})")
    ground = _background(picture, scene)
    palette = torch.stack([rgb(colour) for colour in COLOURS.values()])
    pixels = picture.flatten(1).T
    colour_of = torch.cdist(pixels, torch.cat([palette, ground])).argmin(1).view(SIZE, SIZE)
    return [_verdict(colour_of, thing) for thing in scene.things]


def agreement(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """The fraction of objects that are right, 0 .. 1, for each property."""
    found = list(verdicts)
    return {f.name: sum(getattr(v, f.name) for v in found) / max(len(found), 1) for f in fields(Verdict)}


def _window(position: str) -> tuple[slice, slice]:
    x, y = (min(max(round(c * SIZE) - _CELL // 2, 0), SIZE - _CELL) for c in POSITIONS[position])
    return slice(y, y + _CELL), slice(x, x + _CELL)


def _background(picture: Tensor, scene: Scene) -> Tensor:
    """The background's colours (3 3): its mean, and how far a texture swings to both sides of it."""
    empty = [p for p in POSITIONS if p not in {thing.position for thing in scene.things}]
    pixels = torch.cat([picture[(slice(None), *_window(p))][:, 5:-5, 5:-5].flatten(1) for p in empty], 1)
    middle = pixels.median(1, keepdim=True).values
    near = pixels[:, (pixels - middle).norm(dim=0) < 0.5]  # what is not some other object
    if near.shape[1] < 2:
        return middle.T.expand(3, 3)
    mean = near.mean(1)
    swing = (near - mean[:, None]).abs().mean(1) * 1.3
    return torch.stack([mean, mean + swing, mean - swing])


def _verdict(colour_of: Tensor, thing: Thing) -> Verdict:
    rows, columns = _window(thing.position)
    labels = colour_of[rows, columns]
    mask = (labels < len(COLOURS)).float()
    mask = (F.avg_pool2d(mask[None, None], 3, 1, 1, count_include_pad=False)[0, 0] > 0.5).float()  # without specks
    area = mask.sum()
    if area < _LEAST_AREA:
        return Verdict(False, False, False, False)
    axis = torch.arange(_CELL, dtype=torch.float32)
    x, y = POSITIONS[thing.position]
    off_x = (mask.sum(0) * axis).sum() / area + columns.start + 0.5 - x * SIZE
    off_y = (mask.sum(1) * axis).sum() / area + rows.start + 0.5 - y * SIZE
    votes = torch.bincount(labels[mask.bool()], minlength=len(COLOURS))[: len(COLOURS)]
    templates, areas, meaning = _templates()
    common = templates @ mask.flatten()
    overlap = common / (areas + area - common)
    best = int(overlap.argmax())
    shape, radius = meaning[best]
    fits = bool(overlap[best] >= _LEAST_OVERLAP)
    return Verdict(
        colour=list(COLOURS)[int(votes.argmax())] == thing.colour,
        shape=fits and shape == thing.shape,
        size=fits and min(SIZES, key=lambda name: abs(SIZES[name] - radius)) == thing.size,
        position=bool(max(off_x.abs(), off_y.abs()) < SIZE / 9),
    )


@lru_cache(maxsize=1)
def _templates() -> tuple[Tensor, Tensor, list[tuple[str, float]]]:
    """Masks (t 46*46) of every shape and radius, up to 4 pixels off the centre; their areas; what each one is."""
    masks, meaning = [], []
    axis = torch.arange(_CELL) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    for shape in SHAPES:
        for radius in _RADII:
            for dy in range(-4, 5, 2):
                for dx in range(-4, 5, 2):
                    centre = _CELL / 2
                    inside = signed_distance(shape, x - centre - dx, y - centre - dy, radius * SIZE) < 0
                    masks.append(inside.float().flatten())
                    meaning.append((shape, radius))
    stacked = torch.stack(masks)
    return stacked, stacked.sum(1), meaning
