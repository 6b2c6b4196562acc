"""Draw pictures of prompts with a checkpoint, on merged tokens.

The model is the embedded one, or Stable Diffusion 1.x, 2.x, SDXL, PixArt or AnimateDiff: a safetensors file, a
diffusers folder, or its name on the hub. --motion adds AnimateDiff's motion modules to a Stable Diffusion 1.x model:
clips are animated PNGs, which browsers play. Sampling is k-diffusion's, by the sampler's name, or with --scheduler the
pipeline's own.
Each PNG carries its settings: --from-png reads them, and what else is given on the command line replaces them.

examples:
  tome-sampler generate "a large red ring in the middle on wavy navy" --compare
  tome-sampler generate "a fox in the snow" --model sd15.safetensors --size 768 --preset fast
  tome-sampler generate "a fox in the snow" --model stabilityai/stable-diffusion-xl-base-1.0 --dtype fp16 --device cuda
  tome-sampler generate "a fox runs in the snow" --model sd15.safetensors --motion motion-adapter-v1-5-2/ --frames 16
  tome-sampler generate --from-png out/generate/0000-seed0.png --preset fast:ratio=0.8 --set refresh=always
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_sampler.config import PRESETS, MergeConfig
from tome_sampler.models import DTYPES
from tome_sampler.profiles import read_profile
from tome_sampler.spelling import read_config, read_value

if TYPE_CHECKING:
    from tome_sampler.generate.request import Request

HELP = "draw pictures of prompts with a checkpoint or the embedded model, merged, plain or both"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("prompt", nargs="*", help="what to draw; several are drawn one after the other")
    parser.add_argument(
        "--out", type=Path, default=Path("out/generate"), metavar="DIR", help="folder (default %(default)s)"
    )
    add_sampling_arguments(parser)
    parser.add_argument("--count", type=int, help="pictures of each prompt (default 1)")
    parser.add_argument("--batch", type=int, default=1, help="pictures sampled at once (default %(default)s)")
    parser.add_argument("--image", metavar="FILE", help="start from this picture, scaled to the size")
    parser.add_argument("--strength", type=float, help="how much of --image may change, 0 to 1 (default 0.6)")
    add_merging_arguments(parser)
    parser.add_argument("--plain", action="store_true", help="do not merge")
    parser.add_argument("--compare", action="store_true", help="plain and merged, side by side")
    parser.add_argument("--from-png", type=Path, metavar="FILE", help="settings of a picture that was made with this")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a model and how it is sampled, which ``inspect`` has too."""
    parser.add_argument("--model", help="safetensors file, diffusers folder or hub name (default: the embedded model)")
    parser.add_argument(
        "--model-config", metavar="DIR",
        help="for a safetensors file: diffusers folder or hub name with its configuration and tokenizer "
        "(default: the hub is asked)",
    )  # fmt: skip
    parser.add_argument(
        "--allow-pickle", action="store_true",
        help="read pickled checkpoints (.ckpt, .bin) too. They can hold code that runs when they are read; torch is "
        "told to run none, and safetensors files cannot hold any",
    )  # fmt: skip
    parser.add_argument(
        "--motion", metavar="DIR",
        help="diffusers folder or hub name of AnimateDiff's motion modules (a MotionAdapter), for Stable Diffusion 1.x",
    )  # fmt: skip
    parser.add_argument("--frames", type=int, help="of a clip (default: the model's, 16)")
    parser.add_argument("--negative", help="what not to draw")
    parser.add_argument("--size", metavar="SIDE|HxW", help="pixels (default: the model's)")
    parser.add_argument("--steps", type=int, help="sampling steps, at least 2 (default: the model's, 20)")
    parser.add_argument("--sampler", help="a k-diffusion sampler's name (default: the model's, dpmpp_2m)")
    parser.add_argument(
        "--scheduler", nargs="?", const="", metavar="CLASS",
        help="the pipeline's own loop, with its own scheduler or a class of diffusers such as DDIMScheduler",
    )  # fmt: skip
    parser.add_argument("--cond-scale", type=float, help="guidance scale; 1 is none (default: the model's)")
    parser.add_argument("--seed", type=int, help="of the first picture; each next one has the next (default 0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps (default %(default)s)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of a checkpoint's weights (default fp32)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def add_merging_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that make up a configuration; :func:`config_of` reads them."""
    parser.add_argument(
        "--preset", metavar="NAME[:FIELD=VALUE,...]",
        help=f"settings to start from: {', '.join(PRESETS)}; or fast:ratio=0.7, say (default: default)",
    )  # fmt: skip
    parser.add_argument("--profile", type=Path, metavar="FILE", help="settings that tome-sampler inspect --tune found")
    parser.add_argument(
        "--set", action="append", metavar="FIELD=VALUE", default=[],
        help="any setting of the README's table, such as threshold=None or 'refresh=sigma ratio 4'; repeat it for more",
    )  # fmt: skip


def config_of(args: argparse.Namespace, given: MergeConfig | None = None) -> MergeConfig:
    """The configuration that the command line says, on top of a given one.

    Raises:
        ValueError: a name, a field or a value is unknown or out of range; or there are a preset and a profile.
    """
    if args.preset is not None and args.profile is not None:
        raise ValueError("--preset and --profile are both given; each says all settings")
    config = given or MergeConfig()
    if args.profile is not None:
        config = read_profile(args.profile)
    elif args.preset is not None:
        config = read_config(args.preset)
    values: dict[str, Any] = {}
    for text in args.set:
        field, equals, value = text.partition("=")
        if not (equals and field and value):
            raise ValueError(f"--set is {text!r}; it must be FIELD=VALUE")
        values[field] = read_value(field, value)
    return config.with_(**values)


def size_of(text: str) -> tuple[int, int]:
    """ "512" or "512x768" (height x width) as (height, width).

    Raises:
        ValueError: it is neither.
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() for part in parts):
        raise ValueError(f"size is {text!r}; it must be a number of pixels, or height x width such as 512x768")
    return int(parts[0]), int(parts[-1])


def check_way(args: argparse.Namespace) -> None:
    """Say that two ways to sample are asked for, as one would be lost.

    Raises:
        ValueError: so it is.
    """
    if args.sampler is not None and args.scheduler is not None:
        raise ValueError("--sampler and --scheduler are both given; the pipeline's own loop takes no sampler")


def request_of(args: argparse.Namespace) -> Request:
    """What the command line asks for, a picture's settings under it."""
    from tome_sampler.generate.request import Request, read_png

    check_way(args)
    given = None if args.from_png is None else read_png(args.from_png)
    request = given or Request(tuple(args.prompt))
    names = (
        "model",
        "model_config",
        "motion",
        "frames",
        "dtype",
        "negative",
        "seed",
        "count",
        "steps",
        "sampler",
        "scheduler",
        "cond_scale",
    )
    values = {name: getattr(args, name) for name in (*names, "image", "strength") if getattr(args, name) is not None}
    if args.prompt:
        values["prompts"] = tuple(args.prompt)
    if args.size is not None:
        values["size"] = size_of(args.size)
    if args.sampler is not None:
        values["scheduler"] = None
    if args.scheduler is not None:
        values["sampler"] = None
    if args.model is not None and args.model_config is None and not Path(args.model).expanduser().is_file():
        values["model_config"] = None  # the picture's, of a single file
    if args.plain and (args.compare or args.preset or args.profile or args.set):
        raise ValueError("--plain merges nothing; it goes with neither --compare nor settings of merging")
    merges = not args.plain and (given is None or given.merging is not None or args.compare)
    merges = merges or bool(args.preset or args.profile or args.set)
    values["merging"] = config_of(args, request.config).to_dict() if merges else None
    request = replace(request, **values)
    if args.strength is not None and request.image is None:
        raise ValueError("--strength is of a run that starts from a picture; it goes with --image")
    return request


def run(args: argparse.Namespace) -> int:
    """Do it; the exit status."""
    request = request_of(args)
    from tome_sampler.generate.run import generate

    print(
        generate(
            request,
            args.out,
            device=args.device,
            batch=args.batch,
            compare=args.compare,
            allow_pickle=args.allow_pickle,
            progress=not args.quiet,
        )
    )
    return 0
