"""``tome-sampler``, also ``python -m tome_sampler``: one subcommand a module, imported when it is asked for."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

import tome_sampler

COMMANDS: dict[str, str] = {
    # name: the module that has `HELP`, `add_arguments(parser)` and `run(args) -> exit status`
    "demo": "tome_sampler.demo.command",
    "bench": "tome_sampler.bench.command",
    "generate": "tome_sampler.generate.command",
    "inspect": "tome_sampler.inspect.command",
    "eval": "tome_sampler.eval.command",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; its exit status. What the user got wrong is said in one line, with status 2."""
    parser = argparse.ArgumentParser(
        prog="tome-sampler",
        description="Token merging for diffusion sampling: the same picture, sooner, without training.",
        epilog="Start with 'tome-sampler demo': it samples an embedded model plain and merged, and shows both.",
    )
    parser.add_argument("--version", action="version", version=f"tome-sampler {tome_sampler.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module_name in COMMANDS.items():
        command = import_module(module_name)
        subparser = subparsers.add_parser(
            name,
            help=command.HELP,
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        return int(args.run(args))
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        print(f"tome-sampler {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"tome-sampler {args.command}: stopped", file=sys.stderr)
        return 130
