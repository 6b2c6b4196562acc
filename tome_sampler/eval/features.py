"""Features of pictures for the scene Frechet distance: a small network that was trained on drawn scenes.

It is fixed and ships as ``features.safetensors``. Its distance says how far two sets of pictures lie apart in what
matters in drawn scenes (shapes, colours, sizes, places, textures). It is not FID, and no number of it can be compared
with one.

    python -m tome_sampler.eval.features --out features.safetensors    # trains it again, a few minutes on one core
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from tome_sampler.demo.scenes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, TEXTURES, Scene, draw, random_scene

WEIGHTS = Path(__file__).with_name("features.safetensors")
WIDTH = 32
SIZE = 128
STEPS, BATCH, RATE = 4000, 32, 4e-3
_PARTS = ("shape", "colour", "size", "position")
_KNOWN = (SHAPES, tuple(COLOURS), tuple(SIZES), tuple(POSITIONS))
_WORDS = tuple(zip(_PARTS, _KNOWN, strict=True))


class SceneFeatures(nn.Module):
    """Pictures (b 3 h w) in [-1, 1] as features (b 32). :attr:`answers` reads a scene's properties off them."""

    def __init__(self) -> None:
        super().__init__()
        widths = (5, 16, 32, 48, 64, 64)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU())
                for a, b in itertools.pairwise(widths)
            )
        )
        self.features = nn.Linear(2 * widths[-1], WIDTH)
        self.answers = nn.Linear(WIDTH, sum(map(len, _KNOWN)) + len(TEXTURES) + len(BACKGROUNDS))

    def forward(self, pictures: Tensor) -> Tensor:
        b, _, h, w = pictures.shape
        y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
        places = torch.stack([x, y]).expand(b, -1, -1, -1).to(pictures)
        maps = self.layers(torch.cat([pictures, places], 1)).flatten(2)
        out: Tensor = self.features(torch.cat([maps.mean(2), maps.amax(2)], 1))
        return out


@lru_cache(maxsize=1)
def load_features() -> SceneFeatures:
    """The shipped network."""
    with torch.random.fork_rng(devices=[]):  # making it draws initial weights, from the caller's generator
        network = SceneFeatures()
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return network.eval().requires_grad_(False)


@torch.no_grad()
def features_of(pictures: Tensor) -> Tensor:
    """Features (b 32) of pictures (b 3 h w) in [-1, 1], at any size: brought to 128 x 128 first."""
    if pictures.shape[-2:] != (SIZE, SIZE):
        pictures = F.interpolate(pictures, (SIZE, SIZE), mode="bilinear", antialias=True)
    out: Tensor = load_features()(pictures)
    return out


def _truth(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """Which shapes, colours, sizes and places occur (b n), and the numbers of the texture and the background (b,)."""
    occurs = [
        [float(word in {getattr(thing, part) for thing in scene.things}) for part, words in _WORDS for word in words]
        for scene in scenes
    ]
    textures = [TEXTURES.index(scene.texture) for scene in scenes]
    grounds = [list(BACKGROUNDS).index(scene.background) for scene in scenes]
    return torch.tensor(occurs), torch.tensor(textures), torch.tensor(grounds)


def _loss(answers: Tensor, scenes: Sequence[Scene]) -> Tensor:
    occurs, textures, grounds = _truth(scenes)
    things, texture, ground = answers.split([occurs.shape[1], len(TEXTURES), len(BACKGROUNDS)], 1)
    return (
        F.binary_cross_entropy_with_logits(things, occurs) * 4
        + F.cross_entropy(texture, textures)
        + F.cross_entropy(ground, grounds)
    )


def train(steps: int = STEPS, seed: int = 0, *, progress: bool = True) -> SceneFeatures:
    """The network, trained from a seed on scenes that are drawn as it goes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SceneFeatures()
    rng = random.Random(f"features-{seed}")
    optimizer = torch.optim.AdamW(network.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    bar = tqdm(range(steps), disable=not progress)
    for _ in bar:
        scenes = [random_scene(rng) for _ in range(BATCH)]
        loss = _loss(network.answers(network(draw(scenes, SIZE, rng))), scenes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}")
    return network.eval().requires_grad_(False)


@torch.no_grad()
def right_answers(network: SceneFeatures, count: int, seed: int) -> dict[str, float]:
    """On so many fresh scenes: the share of right yes/no answers, and of right textures and backgrounds."""
    rng = random.Random(f"test-{seed}")
    scenes = [random_scene(rng) for _ in range(count)]
    answers = torch.cat([network.answers(network(draw([scene], SIZE, rng))) for scene in scenes])
    occurs, textures, grounds = _truth(scenes)
    things, texture, ground = answers.split([occurs.shape[1], len(TEXTURES), len(BACKGROUNDS)], 1)
    return {
        "occurs": float(((things > 0) == (occurs > 0.5)).float().mean()),
        "texture": float((texture.argmax(1) == textures).float().mean()),
        "background": float((ground.argmax(1) == grounds).float().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="file to write (default: the shipped one)")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    network = train(args.steps, args.seed)
    save_file({name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}, args.out)
    print(", ".join(f"{name} {share:.1%}" for name, share in right_answers(network, 500, args.seed).items()))


if __name__ == "__main__":
    main()
