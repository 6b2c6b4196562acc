"""Train the embedded model on drawn scenes: ``python -m tome_sampler.demo.train --out runs/demo``.

The U-Net grows outwards. First its inner half, with a convolution of its own at either end, learns to denoise the
scenes at a quarter of the size, 16 x 16 tokens, where a step is cheap: what an object is, and where. Then the whole
U-Net learns 64 x 64 tokens, first with self-attention in tiles, last over everything, while the inner half's own
output is still held to the small picture. Every step's scenes and noise come from (seed, step) alone, so a stopped run
that is started again continues exactly where its last checkpoint was.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from tome_sampler.demo.model import (
    LATENT_CHANNELS,
    LATENT_SIZE,
    PATCH,
    SIGMA_SHIFT,
    SceneModel,
    to_latent,
    with_places,
)
from tome_sampler.demo.scenes import Scene, draw, random_scene

CAPTION_DROPOUT = 0.1
CHECKPOINT_EVERY = 200


INNER = 4  # the inner half works on a grid this many times coarser
INNER_LEVELS = 3
INNER_CHANNELS = 48


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum. inner: the inner half alone; tile: self-attention sees tile x tile tokens; sigma: the
    median noise level."""

    inner: bool
    tile: int
    sigma: float
    batch: int
    steps: int
    lr: float
    final_lr: float


CURRICULUM = (
    Stage(inner=True, tile=64, sigma=2.0, batch=32, steps=6000, lr=1e-3, final_lr=5e-4),
    # half the cost of a step at 64 x 64 is attention over all of it; what is learnt last is to leave no noise
    Stage(inner=False, tile=16, sigma=2.0, batch=4, steps=2200, lr=6e-4, final_lr=3.8e-4),
    Stage(inner=False, tile=16, sigma=0.6, batch=4, steps=2600, lr=8e-4, final_lr=1e-4),
    Stage(inner=False, tile=64, sigma=0.6, batch=4, steps=300, lr=1e-4, final_lr=1e-6),
)


class Trainee(nn.Module):
    """The model, and the two ends that its inner half has while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.model = SceneModel()
        self.inner_in = nn.Conv2d(LATENT_CHANNELS + 6, INNER_CHANNELS, 3, padding=1)
        self.inner_out = nn.Sequential(
            nn.GroupNorm(16, INNER_CHANNELS), nn.SiLU(), nn.Conv2d(INNER_CHANNELS, LATENT_CHANNELS, 3, padding=1)
        )

    def inner(self, latents: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        """The velocity at 16 x 16 tokens, by the inner half alone."""
        unet = self.model.unet
        emb = unet.time_embedding(unet.time_proj(timestep))
        h = self.inner_in(with_places(latents))
        skips = [h]
        for block in unet.down_blocks[-INNER_LEVELS:]:
            h, more = block(hidden_states=h, temb=emb, encoder_hidden_states=cond)
            skips += more
        h = unet.mid_block(h, emb, encoder_hidden_states=cond)
        with self.inner_features() as features:
            for block in unet.up_blocks[:INNER_LEVELS]:
                n = len(block.resnets)
                taken, skips = tuple(skips[-n:]), skips[:-n]
                h = block(hidden_states=h, temb=emb, encoder_hidden_states=cond, res_hidden_states_tuple=taken)
        out: Tensor = self.inner_out(features[0])
        return out

    @contextmanager
    def inner_features(self) -> Iterator[list[Tensor]]:
        """Within it, what the inner half hands on (b 48 16 16) is put into the list."""
        features: list[Tensor] = []
        last = self.model.unet.up_blocks[INNER_LEVELS - 1].attentions[-1]
        with last.register_forward_hook(lambda module, args, output: features.append(output[0])):
            yield features


def stage_at(step: int) -> tuple[Stage, int]:
    """The stage of a global step, and the step within it."""
    for stage in CURRICULUM:
        if step < stage.steps:
            return stage, step
        step -= stage.steps
    raise ValueError(f"the curriculum has {sum(s.steps for s in CURRICULUM)} steps")


def sample_sigma(stage: Stage, generator: torch.Generator) -> Tensor:
    """Noise levels (b,) of the 64 x 64 latent: log-normal around the stage's."""
    return (math.log(stage.sigma) + 1.3 * torch.randn(stage.batch, generator=generator)).exp().clamp(0.02, 42.0)


def timestep_of(sigma: Tensor) -> Tensor:
    """Inverse of :func:`tome_sampler.demo.model.alphas_cumprod`: fractional timesteps in 0 .. 999."""
    u = torch.atan(sigma / SIGMA_SHIFT) * 2 / math.pi
    return ((u - 0.006) / (0.97 - 0.006) * 999).clamp(0, 999)


def scenes_at(step: int, seed: int) -> tuple[random.Random, list[Scene]]:
    """The scenes of a step, and the generator that what else is random in it comes from."""
    rng = random.Random(f"{seed}-{step}")
    rng.getrandbits(48)  # the noise's seed, see batch_at
    return rng, [random_scene(rng) for _ in range(stage_at(step)[0].batch)]


def batch_at(step: int, seed: int) -> tuple[Stage, Tensor, list[str], Tensor, Tensor]:
    """What step `step` trains on: stage, latents, captions, sigmas and noise; a pure function of (step, seed).

    For the inner half: small pictures, and the noise that averaging over 4 x 4 tokens leaves of sigma.
    """
    stage, _ = stage_at(step)
    rng, scenes = scenes_at(step, seed)
    generator = torch.Generator().manual_seed(random.Random(f"{seed}-{step}").getrandbits(48))
    latents = to_latent(draw(scenes, PATCH * LATENT_SIZE // (INNER if stage.inner else 1), rng))
    captions = ["" if rng.random() < CAPTION_DROPOUT else scene.caption for scene in scenes]
    return stage, latents, captions, sample_sigma(stage, generator), torch.randn(latents.shape, generator=generator)


@contextmanager
def tiled_attention(unet: nn.Module, stage: Stage) -> Iterator[None]:
    """Within it, self-attention over more than tile x tile tokens runs in tiles of that size."""

    def split(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        side = math.isqrt(args[0].shape[1])
        if side <= stage.tile:
            return args
        n = side // stage.tile
        return (rearrange(args[0], "b (y h x w) c -> (b y x) (h w) c", y=n, x=n, h=stage.tile), *args[1:])

    def join(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if output.shape[0] == stage.batch:
            return output
        n = math.isqrt(output.shape[0] // stage.batch)
        return rearrange(output, "(b y x) (h w) c -> b (y h x w) c", y=n, x=n, h=stage.tile)

    with ExitStack() as stack:
        for name, module in unet.named_modules():
            if name.endswith("attn1"):
                stack.enter_context(module.register_forward_pre_hook(split))
                stack.enter_context(module.register_forward_hook(join))
        yield


def noisy_and_velocity(latents: Tensor, sigma: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The network's input and target in a variance-preserving process (Salimans & Ho 2022)."""
    s = sigma[:, None, None, None]
    scale = (1 + s**2).rsqrt()
    return (latents + s * noise) * scale, (noise - s * latents) * scale


def loss_of(
    trainee: Trainee, stage: Stage, latents: Tensor, captions: list[str], sigma: Tensor, noise: Tensor
) -> Tensor:
    """Mean squared error of the velocity; of the whole U-Net with half the inner half's added."""
    ids, phrases = trainee.model.text.tokenize(captions)
    if stage.inner:
        noisy, target = noisy_and_velocity(latents, sigma / INNER, noise)
        with torch.autocast("cpu", torch.bfloat16):
            out = trainee.inner(noisy, timestep_of(sigma), trainee.model.text(ids, phrases))
        return (out.float() - target).square().mean()
    noisy, target = noisy_and_velocity(latents, sigma, noise)
    _, small_target = noisy_and_velocity(
        F.avg_pool2d(latents, INNER), sigma / INNER, F.avg_pool2d(noise, INNER) * INNER
    )
    with torch.autocast("cpu", torch.bfloat16), trainee.inner_features() as features:
        out = trainee.model(noisy, timestep_of(sigma), trainee.model.text(ids, phrases))
        small = trainee.inner_out(features[0])
    loss: Tensor = (out.float() - target).square().mean() + 0.5 * (small.float() - small_target).square().mean()
    return loss


def save_weights(model: SceneModel, path: Path) -> None:
    """The weights as fp16 safetensors, contiguous, nothing else."""
    save_file({k: v.detach().half().contiguous() for k, v in model.state_dict().items()}, path)


def train(out: Path, seed: int, stop_at: int | None = None) -> None:
    """Run, or continue, the curriculum; writes checkpoint.pt and weights.safetensors (EMA) into `out`."""
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    trainee = Trainee().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(trainee).requires_grad_(False)
    optimizer = torch.optim.AdamW(trainee.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start, checkpoint = 0, out / "checkpoint.pt"
    if checkpoint.exists():
        state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        trainee.load_state_dict(state["trainee"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    total = min(sum(stage.steps for stage in CURRICULUM), stop_at or 10**9)
    recent = 0.0
    with tqdm(total=total, initial=start, desc="train", mininterval=5, dynamic_ncols=True) as bar:
        for step in range(start, total):
            stage, latents, captions, sigma, noise = batch_at(step, seed)
            _, within = stage_at(step)
            lr = stage.lr + (stage.final_lr - stage.lr) * within / stage.steps
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (within + 1) / 200)
            with tiled_attention(trainee.model.unet, stage):
                loss = loss_of(trainee, stage, latents, captions, sigma, noise)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                weight = 1 - min(0.998, (within + 1) / (within + 10))
                torch._foreach_lerp_(list(average.parameters()), list(trainee.parameters()), weight)
            recent = loss.item() if step == start else 0.98 * recent + 0.02 * loss.item()
            bar.update()
            bar.set_postfix(inner=stage.inner, tile=stage.tile, loss=f"{recent:.4f}", refresh=False)
            if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == total:
                state = {"trainee": trainee.state_dict(), "average": average.state_dict()}
                torch.save({**state, "optimizer": optimizer.state_dict(), "step": step + 1}, out / "checkpoint.tmp")
                (out / "checkpoint.tmp").replace(checkpoint)
                save_weights(average.model, out / "weights.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tome_sampler.demo.train", description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        help="folder for checkpoint and weights; an existing checkpoint is continued",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, scenes and noise (default 0)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
    parser.add_argument(
        "--stop-at", type=int, default=None, help="stop after this many steps in all (default: the whole curriculum)"
    )
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    train(args.out, args.seed, args.stop_at)


if __name__ == "__main__":
    main()
