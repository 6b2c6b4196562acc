"""What is drawn: held-out captions of the embedded model, or the user's prompts; each with its seeds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tome_sampler.demo.scenes import CaptionError, Scene, random_scene, scene_from_caption

NEXT_SEED = 1_000_000
"""How far apart a prompt's seeds are, so that a prompt's further seeds are not another prompt's."""


@dataclass(frozen=True)
class Case:
    """One picture to draw. number: of its prompt, from 0."""

    number: int
    prompt: str
    seed: int


def cases(prompts: Sequence[str], seeds: int, first_seed: int) -> list[Case]:
    """Every prompt with so many seeds, prompt by prompt, so that the beginning of the list is a smaller set."""
    return [
        Case(number, prompt, first_seed + number + NEXT_SEED * further)
        for number, prompt in enumerate(prompts)
        for further in range(seeds)
    ]


def held_out_captions(count: int, first_seed: int) -> list[str]:
    """Random captions that the shipped weights were not trained on; each is known by its own seed.

    Nearly every caption with a single object was seen in training, so most of these have two or three.
    """
    captions = []
    for number in range(count):
        rng = random.Random(first_seed + number)
        while (caption := random_scene(rng).caption) in trained_captions():
            pass
        captions.append(caption)
    return captions


@lru_cache(maxsize=1)
def trained_captions() -> frozenset[str]:
    """Which captions those were, the trainer's seed tells exactly."""
    from tome_sampler.demo.train import CURRICULUM, scenes_at

    steps = sum(stage.steps for stage in CURRICULUM)
    return frozenset(scene.caption for step in range(steps) for scene in scenes_at(step, seed=0)[1])


def read_prompts(path: Path) -> list[str]:
    """A prompt a line; empty lines and lines that begin with # do not count.

    Raises:
        ValueError: there are none, or the file is no text. OSError: it cannot be read.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8; it must have one prompt a line") from None
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{path} has no prompts; it must have one a line")
    return prompts


def scene_of(prompt: str) -> Scene | None:
    """The scene that a prompt describes completely, in the embedded model's words; else None."""
    try:
        return scene_from_caption(prompt)
    except CaptionError:
        return None
