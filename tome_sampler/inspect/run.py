"""One run looked at from all sides: sampled plain under a probe, then merged, and what both say written down."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import tome_sampler
from tome_sampler.config import MergeConfig
from tome_sampler.demo.report import fidelity
from tome_sampler.generate.run import make_folder
from tome_sampler.inspect import plots
from tome_sampler.inspect.probe import BINS, Probe, Watched, probing
from tome_sampler.inspect.tune import Proposal, propose
from tome_sampler.models import Model
from tome_sampler.models.own_loop import calls_of, sample_in_pipeline
from tome_sampler.models.pipeline import PipelineModel
from tome_sampler.models.run import Sampled, Settings, sample
from tome_sampler.pairing import Pairing
from tome_sampler.profiles import write_profile
from tome_sampler.session import MergeSession
from tome_sampler.spelling import refresh_text

_MAPS = 5  # steps of which maps are drawn

Seen = list[tuple[int, Tensor | None, Pairing | None, tuple[int, int] | None]]


def inspect(
    model: Model,
    prompt: str,
    seed: int,
    settings: Settings,
    config: MergeConfig,
    out: Path,
    *,
    negative: str = "",
    scheduler: str | None = None,
    tune: tuple[float, float] | None = None,
    progress: bool = True,
) -> str:
    """Write inspect.json and pictures into the folder `out`; returns the text to show.

    Args:
        scheduler: None: by k-diffusion's sampler; else by the pipeline's own loop, see ``generate``.
        tune: the share of the tokens that is to be merged and the similarity that reuse may lose: propose settings, run
            them, and write profile.json too.

    Raises:
        ValueError: nothing of the model is merged with this configuration, or the folder cannot be written into.
    """
    steps = settings.steps
    if scheduler is not None and isinstance(model, PipelineModel):
        steps = calls_of(model, steps, scheduler)
    make_folder(out)  # before there are figures that could not be saved
    calls: list[Watched] = []

    @contextmanager
    def under_probe(levels: list[float] | None = None) -> Iterator[Probe]:
        with probing(model.module if levels else getattr(model, "pipe", model), config, levels) as probe:
            yield probe
            calls.extend(probe.calls)
            notes.extend(probe.stats.notes)

    notes: list[str] = []
    runs = 2 + (tune is not None)
    with tqdm(total=runs * steps, desc="sampling", unit="step", disable=not progress) as bar:

        def run(merging: Any, look: Callable[[int, MergeSession | None], None] | None = None) -> Sampled:
            def on_step(step: int, session: MergeSession | None) -> None:
                bar.update()
                if look is not None:
                    look(step, session)

            common: dict[str, Any] = {"negative": negative, "on_step": on_step}
            if scheduler is not None and isinstance(model, PipelineModel):
                return sample_in_pipeline(model, [prompt], [seed], settings, merging, scheduler=scheduler, **common)
            return sample(model, [prompt], [seed], settings, merging, **common)

        plain = run(under_probe)
        if not any(call.layers for call in calls):
            why = "; ".join(notes) or "no layer is on a merged level"
            raise ValueError(f"nothing of {model.name} is merged with these settings: {why}")
        maps: Seen = []
        merged = run(config, lambda step, session: _look(step, session, steps, maps))
        found = tuned = None
        if tune is not None:
            found = propose(calls, config, *tune)
            tuned = run(found.config)
    picture, stats = plain.pictures[0], merged.stats or {}
    data = {
        "model": model.name,
        "prompt": prompt,
        "negative": negative,
        "seed": seed,
        "settings": asdict(settings),
        "config": config.to_dict(),
        "bins": BINS,
        "calls": [asdict(call) for call in calls],
        "merged": _outcome(merged, picture) | {"stats": stats},
        "versions": {"tome_sampler": tome_sampler.__version__, "torch": torch.__version__},
    }
    lines = [_outcome_line("these settings", merged, picture)]
    if found is not None and tuned is not None:
        outcome = _outcome(tuned, picture)
        data["tuned"] = found.to_dict() | outcome
        measured = {"prompt": prompt, "seed": seed, "settings": asdict(settings), **outcome}
        write_profile(out / "profile.json", found.config, model=model.name, measured=measured)
        lines += [_outcome_line("proposed", tuned, picture), _proposal_line(found), f"profile: {out / 'profile.json'}"]
    (out / "inspect.json").write_text(json.dumps(data) + "\n")  # the figures before the pictures of them
    plots.similarities(calls, config.threshold, out / "similarity.png")
    plots.distances(calls, out / "jaccard.png")
    plots.tokens(stats, out / "tokens.png")
    drawn = merged.pictures[0]
    plots.maps(drawn if settings.frames is None else drawn[0], maps, out / "maps.png")
    if found is not None:
        plots.proposal(found, out / "tune.png")
    return "\n".join([_summary(calls), *lines, f"in {out}"])


def _look(step: int, session: MergeSession | None, steps: int, maps: Seen) -> None:
    """Note importance and pairs at a few steps, evenly over the run."""
    if session is None or step not in {round(i * (steps - 1) / (_MAPS - 1)) for i in range(_MAPS)}:
        return
    pairing = next(iter(session.pairings().values()), None)
    grid = None if pairing is None else session.grid(pairing.row.shape[1])
    importance = None if session.importance is None else session.importance[0].cpu()
    maps.append((step, importance, pairing, grid))


def _outcome(run: Sampled, picture: Tensor) -> dict[str, Any]:
    """What a merged run came to. psnr, ssim: to the plain picture."""
    psnr, ssim = fidelity(run.pictures[0], picture)
    stats = run.stats or {}
    kept = {key: stats.get(key) for key in ("merged_fraction", "pairings_made", "pairings_reused", "notes")}
    return {**kept, "psnr": psnr, "ssim": ssim, "seconds": run.seconds}


def _outcome_line(name: str, run: Sampled, picture: Tensor) -> str:
    found = _outcome(run, picture)
    return (
        f"{name}: {found['merged_fraction']:.0%} of the tokens merged, pairs made {found['pairings_made']} times and "
        f"reused {found['pairings_reused']} times, {found['psnr']:.1f} dB, SSIM {found['ssim']:.4f} to plain"
    )


def _proposal_line(found: Proposal) -> str:
    config = found.config
    return f"proposed: threshold={config.threshold}, refresh={refresh_text(config.refresh)}"


def _summary(calls: list[Any]) -> str:
    layers = {name for call in calls for name in call.layers}
    distances = [look.jaccard for call in calls for look in call.layers.values() if look.jaccard is not None]
    mean = sum(distances) / len(distances) if distances else 0.0
    return f"{len(layers)} merged layers, {len(calls)} model calls; new pairs in each differ by {mean:.2f} (Jaccard)"
