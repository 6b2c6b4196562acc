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

from tome_sampler.generate.command import add_merging_arguments, add_sampling_arguments, config_of, size_of

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
        "--share",
        type=float,
        default=0.3,
        help="with --tune: share of the tokens that the threshold merges (default %(default)s)",
    )
    parser.add_argument(
        "--loss", type=float, default=0.01,
        help="with --tune: cosine similarity that reused pairs may lose on average (default %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Do it; the exit status."""
    config = config_of(args)
    from tome_sampler.generate.request import Request
    from tome_sampler.generate.run import with_defaults
    from tome_sampler.inspect.run import inspect
    from tome_sampler.models import open_model

    model = open_model(
        args.model,
        device=args.device,
        dtype=args.dtype or "fp32",
        config=args.model_config,
        allow_pickle=args.allow_pickle,
        motion=args.motion,
    )
    asked = Request(
        (args.prompt,),
        size=None if args.size is None else size_of(args.size),
        steps=args.steps,
        sampler=args.sampler,
        cond_scale=args.cond_scale,
        frames=args.frames,
        scheduler=args.scheduler,
    )
    _, settings = with_defaults(asked, model)
    tune = (args.share, args.loss) if args.tune else None
    text = inspect(
        model, args.prompt, args.seed or 0, settings, config, args.out,
        negative=args.negative or "", scheduler=args.scheduler, tune=tune, progress=not args.quiet,
    )  # fmt: skip
    print(text)
    return 0
