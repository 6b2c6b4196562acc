"""The same seeds, sampled plain and merged by an unmodified k-diffusion sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from tqdm import tqdm

from tome_sampler import demo
from tome_sampler.config import MergeConfig
from tome_sampler.models import open_model
from tome_sampler.models.embedded import SIZE
from tome_sampler.models.run import Settings
from tome_sampler.models.run import sample as run_model
from tome_sampler.pairing import Pairing
from tome_sampler.session import MergeSession


@dataclass(frozen=True)
class Sample:
    """One sampled picture. picture: (3 128 128) in [-1, 1]. seconds: wall time of the whole sampling.

    Of merged runs also: stats; and from the middle of the run the importance (h w) and the pairing of the first
    merged layer, where there were any.
    """

    picture: Tensor
    seconds: float
    stats: dict[str, Any] | None = None
    importance: Tensor | None = None
    pairing: Pairing | None = None


@dataclass(frozen=True)
class Pair:
    """A prompt's pictures, from the same seed."""

    prompt: str
    seed: int
    plain: Sample
    merged: Sample


@dataclass(frozen=True)
class Comparison:
    """All prompts' pairs, and how they were made."""

    pairs: list[Pair]
    config: MergeConfig
    sampler: str
    steps: int
    cond_scale: float
    device: str


def sample(
    prompt: str,
    config: MergeConfig | None,
    *,
    steps: int,
    sampler: str,
    cond_scale: float,
    seed: int,
    device: str = "cpu",
    on_step: Any = None,
) -> Sample:
    """Sample the embedded model once; merged if there is a config.

    Raises:
        ValueError: there are fewer than 2 steps, or there is no such sampler.
    """
    settings = Settings((SIZE, SIZE), steps, sampler, cond_scale)
    middle: dict[str, Any] = {}

    def look(step: int, session: MergeSession | None) -> None:
        if session is not None and step == steps // 2:
            middle["importance"] = None if session.importance is None else session.importance[0].cpu()
            middle["pairing"] = next(iter(session.pairings().values()), None)
        if on_step is not None:
            on_step()

    run = run_model(open_model(device=device), [prompt], [seed], settings, config, on_step=look)
    return Sample(run.pictures[0], run.seconds, run.stats, middle.get("importance"), middle.get("pairing"))


def compare(
    prompts: Sequence[str],
    config: MergeConfig,
    *,
    steps: int = 20,
    sampler: str = "dpmpp_2m",
    cond_scale: float = 3.0,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> Comparison:
    """Plain and merged pictures of each prompt, sampled in turn, so that both meet the same load of the machine."""
    settings: dict[str, Any] = {"sampler": sampler, "cond_scale": cond_scale, "device": device}
    demo.encode(prompts)  # a caption that cannot be drawn is told before anything is sampled
    for warm_up in (None, config):
        sample(prompts[0], warm_up, steps=2, seed=seed, **settings)
    pairs = []
    with tqdm(total=2 * len(prompts) * steps, desc="sampling", unit="step", disable=not progress) as bar:
        for number, prompt in enumerate(prompts):
            plain, merged = (
                sample(prompt, c, steps=steps, seed=seed + number, on_step=bar.update, **settings)
                for c in (None, config)
            )
            pairs.append(Pair(prompt, seed + number, plain, merged))
    return Comparison(pairs, config, sampler, steps, cond_scale, device)
