"""The automatic check must call drawn pictures right, and changed ones wrong in just what was changed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tome_sampler.demo.check import agreement, check_scene
from tome_sampler.demo.scenes import COLOURS, POSITIONS, SHAPES, SIZES, Scene, draw, random_scene

DISTURBED: dict[str, Callable[[Tensor], Tensor]] = {
    "as drawn": lambda p: p,
    "noisy": lambda p: p + 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)),
    "blurred": lambda p: F.avg_pool2d(p[None], 3, 1, 1, count_include_pad=False)[0],
    "saturated": lambda p: (p * 1.3).clamp(-1, 1),
}


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Tensor, Scene]]:
    rng = random.Random(3)
    scenes = [random_scene(rng) for _ in range(150)]
    return list(zip(draw(scenes, 128, rng), scenes, strict=True))


@pytest.mark.parametrize("how", DISTURBED)
def test_drawn_pictures_are_right(how: str, drawn: list[tuple[Tensor, Scene]]) -> None:
    right = agreement(v for picture, scene in drawn for v in check_scene(DISTURBED[how](picture), scene))
    assert min(right.values()) >= 0.99, right


@pytest.mark.parametrize(("what", "words"), [("shape", SHAPES), ("colour", tuple(COLOURS)), ("size", tuple(SIZES))])
def test_a_wrong_property_and_only_that_is_wrong(
    what: str, words: tuple[str, ...], drawn: list[tuple[Tensor, Scene]]
) -> None:
    rng = random.Random(4)

    def other(word: str) -> str:
        return rng.choice([w for w in words if w != word])

    verdicts = []
    for picture, scene in drawn:
        claimed = tuple(replace(thing, **{what: other(getattr(thing, what))}) for thing in scene.things)
        verdicts += check_scene(picture, replace(scene, things=claimed))
    right = agreement(verdicts)
    assert right.pop(what) <= 0.01
    assert min(right.values()) >= 0.99


def test_nothing_is_right_about_an_object_that_is_elsewhere(drawn: list[tuple[Tensor, Scene]]) -> None:
    rng, verdicts = random.Random(5), []
    for picture, scene in drawn:
        taken = {thing.position for thing in scene.things}
        moved = replace(scene.things[0], position=rng.choice([p for p in POSITIONS if p not in taken]))
        verdicts += check_scene(picture, replace(scene, things=(moved, *scene.things[1:])))[:1]
    assert max(agreement(verdicts).values()) <= 0.02


def test_a_picture_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 64, 64\); it must be \(3 128 128\)"):
        check_scene(torch.zeros(3, 64, 64), random_scene(random.Random(0)))
