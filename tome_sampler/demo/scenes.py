"""Drawn scenes and their captions: what the embedded model was trained on.

A scene is one to three objects on a textured background. Every property of it stands in its caption, so whether a
generated picture is *right* can be checked without another model (:mod:`tome_sampler.demo.check`). Pictures are
drawn from signed distances, batched and anti-aliased, so one scene can be drawn at any resolution.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (50, 175, 60),
    "blue": (45, 85, 225),
    "yellow": (245, 215, 50),
    "purple": (150, 60, 190),
    "white": (245, 245, 245),
    "black": (22, 22, 26),
}
SIZES: dict[str, float] = {"small": 0.095, "large": 0.15}  # radius as a fraction of the picture's width
POSITIONS: dict[str, tuple[float, float]] = {
    f"{row} {column}".strip() or "middle": (x, y)
    for row, y in (("top", 1 / 6), ("", 1 / 2), ("bottom", 5 / 6))
    for column, x in (("left", 1 / 6), ("", 1 / 2), ("right", 5 / 6))
}
TEXTURES = ("plain", "striped", "dotted", "checked", "wavy")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "grey": (140, 140, 140),
    "brown": (128, 92, 66),
    "teal": (72, 132, 136),
    "pink": (214, 156, 170),
    "navy": (52, 62, 100),
}
WORDS = (
    *SHAPES, *COLOURS, *SIZES, "top", "bottom", "left", "right", "middle", *TEXTURES, *BACKGROUNDS,
)  # fmt: skip
_STOP_WORDS = {"a", "an", "the", "at", "in", "of", "to", "with", "background", "scene", "picture"}


class CaptionError(ValueError):
    """A caption holds a word that the embedded model does not know."""


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object of a scene, in the words of its caption."""

    shape: str
    colour: str
    size: str
    position: str

    @property
    def phrase(self) -> str:
        preposition = "in the" if self.position == "middle" else "at the"
        return f"a {self.size} {self.colour} {self.shape} {preposition} {self.position}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A background and one to three objects, no two of them in the same ninth of the picture."""

    things: tuple[Thing, ...]
    texture: str
    background: str

    @property
    def caption(self) -> str:
        return ", ".join(thing.phrase for thing in self.things) + f" on {self.texture} {self.background}"


def random_scene(rng: random.Random) -> Scene:
    """A scene drawn uniformly: number of objects, places, shapes, colours, sizes, texture, background."""
    places = rng.sample(list(POSITIONS), rng.randint(1, 3))
    things = tuple(
        Thing(shape=rng.choice(SHAPES), colour=rng.choice(list(COLOURS)), size=rng.choice(list(SIZES)), position=place)
        for place in places
    )
    return Scene(things=things, texture=rng.choice(TEXTURES), background=rng.choice(list(BACKGROUNDS)))


def parse_caption(caption: str) -> list[list[str]]:
    """The known words of a caption, phrase by phrase: a phrase is one object, or the background.

    Phrases end at a comma, a semicolon, "and" or "on". An empty caption (the unconditional one) has no phrases.

    Raises:
        CaptionError: a word is unknown; the message lists the vocabulary.
    """
    phrases = []
    for phrase in re.split(r"[,;.]|\band\b|\bon\b", caption.lower()):
        words = [word for word in re.findall(r"[a-z]+", phrase) if word not in _STOP_WORDS]
        for word in words:
            if word not in WORDS:
                raise CaptionError(f"the embedded model does not know {word!r}; it knows: {' '.join(WORDS)}")
        if words:
            phrases.append(words)
    return phrases


def scene_from_caption(caption: str) -> Scene:
    """The scene that a complete caption describes.

    Raises:
        CaptionError: a word is unknown, or a property of an object or of the background is missing.
    """
    things, texture, background = [], "", ""
    for words in parse_caption(caption):
        found = {
            "shape": next((w for w in words if w in SHAPES), ""),
            "colour": next((w for w in words if w in COLOURS), ""),
            "size": next((w for w in words if w in SIZES), ""),
            "position": " ".join(w for w in ("top", "bottom", "middle", "left", "right") if w in words),
        }
        if any(found.values()):
            missing = [name for name, word in found.items() if not word]
            if missing or found["position"] not in POSITIONS:
                raise CaptionError(f"{' '.join(words)!r} needs a {', '.join(missing or ['position'])}")
            things.append(Thing(**found))
        else:
            texture = next((w for w in words if w in TEXTURES), texture)
            background = next((w for w in words if w in BACKGROUNDS), background)
    if not (things and texture and background):
        raise CaptionError(f"{caption!r} needs an object and a background such as 'on striped teal'")
    return Scene(things=tuple(things), texture=texture, background=background)


def rgb(colour: tuple[int, int, int]) -> Tensor:
    """A colour of 0 .. 255 as (3,) in [-1, 1]."""
    return torch.tensor(colour, dtype=torch.float32).div(127.5).sub(1)


def signed_distance(shape: str, x: Tensor, y: Tensor, r: float) -> Tensor:
    """Signed distance (negative inside) to a shape of radius r centred at the origin."""
    if shape == "circle":
        return torch.hypot(x, y) - r
    if shape == "ring":
        return (torch.hypot(x, y) - 0.72 * r).abs() - 0.28 * r
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.86 * r
    if shape == "cross":
        arm, half = r, 0.3 * r
        bar = torch.maximum(x.abs() - arm, y.abs() - half)
        return torch.minimum(bar, torch.maximum(x.abs() - half, y.abs() - arm))
    slope = math.sqrt(5) / 2  # triangle: apex up, base 2r wide and 2r below... sides of slope 2
    return torch.maximum((x.abs() * 2 - y - r) / (2 * slope), y - 0.86 * r)


def draw(scenes: Sequence[Scene], size: int, rng: random.Random) -> Tensor:
    """Pictures (b 3 size size) in [-1, 1]; `rng` jitters places, sizes and the textures' phase."""
    axis = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    pictures = []
    for scene in scenes:
        base = rgb(BACKGROUNDS[scene.background])
        u, v = x + rng.random(), y + rng.random()
        if scene.texture == "striped":
            wave = torch.sin(2 * math.pi * 7 * (u + v))
        elif scene.texture == "dotted":
            wave = 2 * torch.sigmoid(8 * (torch.cos(2 * math.pi * 8 * u) + torch.cos(2 * math.pi * 8 * v) - 0.9)) - 1
        elif scene.texture == "checked":
            wave = torch.tanh(4 * torch.sin(2 * math.pi * 5 * u) * torch.sin(2 * math.pi * 5 * v))
        elif scene.texture == "wavy":
            wave = torch.sin(2 * math.pi * (6 * v + 0.35 * torch.sin(2 * math.pi * 2 * u)))
        else:
            wave = torch.zeros_like(x)
        picture = base[:, None, None] + 0.13 * wave
        for thing in scene.things:
            px, py = POSITIONS[thing.position]
            r = SIZES[thing.size] * rng.uniform(0.92, 1.06)
            px, py = px + rng.uniform(-0.012, 0.012), py + rng.uniform(-0.012, 0.012)
            distance = signed_distance(thing.shape, x - px, y - py, r)
            inside = (0.5 - distance * size).clamp(0, 1)
            picture = picture + inside * (rgb(COLOURS[thing.colour])[:, None, None] - picture)
        pictures.append(picture)
    return torch.stack(pictures).clamp(-1, 1)
