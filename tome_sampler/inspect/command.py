"""Look at what merging sees and does in one run of a model, and let settings be proposed.

The run is sampled plain, with pairs made anew in each model call and not used, and then merged. Writes into --out:
  similarity.png  how alike each token and its most similar destination are, per layer and call (CA-ToMe, figure 2)
  jaccard.png     how far the pairs of adjacent calls differ, per layer (CA-ToMe, figure 4)
  tokens.png      the share of the tokens that was merged, per layer and call
  maps.png        importance and merged groups over the picture, of a clip its first frame
  inspect.json    all figures
and with --tune also tune.png and profile.json, which `generate --profile` takes.

examples:
  tome-sampler inspect "a large red ring in the middle on wavy navy" --tune
  tome-sampler inspect "a fox in the snow" --model sd15.safetensors --preset fast
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tome_sampler.config import MergeConfig
from tome_sampler.generate.command import add_merging_arguments, add_sampling_arguments, check_way, config_of, size_of

HELP = "look at what merging sees and does in a run; with --tune, propose settings"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("prompt", help="what to draw")
    parser.add_argument(
        "--out", type=Path, default=Path("out/inspect"), metavar="DIR", help="folder (default %(default)s)"
    )
    add_sampling_arguments(parser)
    add_merging_arguments(parser)
    parser.add_argument("--tune", action="store_true", help="propose a threshold and a refresh policy, and run them")
    parser.add_argument(
        "--share", type=float, help="with --tune: share of the tokens that the threshold merges (default 0.3)"
    )
    parser.add_argument(
        "--loss", type=float,
        help="with --tune: cosine similarity that reused pairs may lose on average (default 0.01)",
    )  # fmt: skip


def tune_of(args: argparse.Namespace, config: MergeConfig) -> tuple[float, float] | None:
    """The share and the loss to tune to, or None: nothing is tuned.

    Raises:
        ValueError: one is out of range, or given where nothing is tuned.
    """
    from tome_sampler.inspect.tune import check_aims

    if not args.tune:
        if args.share is not None or args.loss is not None:
            raise ValueError("--share and --loss are what --tune aims at; they go with it")
        return None
    aims = (0.3 if args.share is None else args.share, 0.01 if args.loss is None else args.loss)
    check_aims(config, *aims)
    return aims


def run(args: argparse.Namespace) -> int:
    """Do it; the exit status."""
    config = config_of(args)
    check_way(args)
    tune = tune_of(args, config)
    from tome_sampler.generate.request import Request
    from tome_sampler.generate.run import memory_said, with_defaults
    from tome_sampler.inspect import plots
    from tome_sampler.inspect.run import inspect
    from tome_sampler.models import open_model

    plots.require_matplotlib()
    asked = Request(
        (args.prompt,),
        size=None if args.size is None else size_of(args.size),
        steps=args.steps,
        sampler=args.sampler,
        cond_scale=args.cond_scale,
        frames=args.frames,
        scheduler=args.scheduler,
        seed=args.seed or 0,
    )
    with memory_said("--size or --frames"):
        model = open_model(
            args.model,
            device=args.device,
            dtype=args.dtype or "fp32",
            config=args.model_config,
            allow_pickle=args.allow_pickle,
            motion=args.motion,
        )
        _, settings = with_defaults(asked, model)
        text = inspect(
            model, args.prompt, asked.seed, settings, config, args.out,
            negative=args.negative or "", scheduler=args.scheduler, tune=tune, progress=not args.quiet,
        )  # fmt: skip
    print(text)
    return 0
