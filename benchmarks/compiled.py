"""What merging gains where torch.compile is at work: plain and merged, each as it is and compiled, in one run.

Whole runs, step by step in turn, each method on its own way to its own picture, at fixed ratios, whose lengths are
known beforehand. All graphs are made before it begins, in steps that are not timed.

    python benchmarks/compiled.py --arch sd15 --size 512 --dtype bf16
    python benchmarks/compiled.py --arch sd15 --size 1024 --dtype fp16 --device cuda --mode reduce-overhead
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from tqdm import tqdm

from tome_sampler import MergeSession, merging
from tome_sampler.bench import report
from tome_sampler.bench.architectures import ARCHITECTURES, build
from tome_sampler.bench.host import Host
from tome_sampler.bench.measure import threads
from tome_sampler.bench.settings import device_of
from tome_sampler.bench.timing import take
from tome_sampler.models import DTYPES
from tome_sampler.spelling import read_config, split_methods

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
EARLIEST_AND_LATEST = (0, -1)  # steps of a run: one of each graph that a method has


class Way:
    """One way to run a model, `model`, and what its run took. session: of its merging. graphs: how many it has."""

    def __init__(self, name: str, host: Host, session: MergeSession | None) -> None:
        self.name, self.host, self._session = name, host, session
        self.graphs, self.compiled_in = 0, 0.0
        self.seconds: list[float] = []

    def step(self, sigma: float, following: float) -> None:
        """From one noise level to the next one."""
        call = nullcontext() if self._session is None else self._session.call(self.host.describe(sigma))
        out, taken = take(partial(self._model, self.host.inputs(self._x, sigma), call), self.host.device)
        self._x = self.host.advance(self._x, out, sigma, following)
        self.seconds.append(taken.seconds)

    def restart(self, sigmas: list[float]) -> None:
        """A new run begins."""
        self._x = self.host.noise * sigmas[0]
        self.seconds = []
        if self._session is not None:
            self._session.reset(sigmas)

    def merged_fraction(self) -> float | None:
        """Of the tokens of all merged layers, in the run that has ended."""
        return None if self._session is None else self._session.stats.to_dict()["merged_fraction"]

    def _model(self, inputs: tuple[Tensor, Tensor], call: AbstractContextManager[None]) -> Tensor:
        with call:
            out = self.host(inputs)
        if self._session is not None:
            self._session.observe(*self.host.halves(out))
        return out


def twin(model: nn.Module) -> nn.Module:
    """The same model once more, of the same weights, for hooks and graphs of its own."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def compiled(model: nn.Module, way: Way, mode: str) -> Any:
    """The model, compiled with a compiler of its own: graphs are kept by code and compiler, and hooks are not among
    what is asked before one is used, so that one way's graphs would be taken for another's."""

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        way.graphs += 1
        return compile_fx(graph, inputs, config_patches=list_mode_options(mode))

    return torch.compile(
        model, backend=compiler, dynamic=False
    )  # what differs from way to way is no reason for symbols


def ways_of(args: argparse.Namespace, device: torch.device, stack: ExitStack) -> list[Way]:
    """Plain and each method, twice; merging is on until the stack is closed."""
    architecture = ARCHITECTURES[args.arch]
    model = build(args.arch, DTYPES[args.dtype], device, 0)
    common = {**architecture.settings, "threshold": None}
    ways = []
    for name in ["plain", *split_methods(args.methods)]:
        for is_compiled in (False, True):
            own = twin(model)
            session = None if name == "plain" else stack.enter_context(merging(own, read_config(name, common)))
            host = Host(args.arch, architecture, own, args.size or architecture.size, args.batch)
            ways.append(Way(f"{name}, compiled" if is_compiled else name, host, session))
            if is_compiled:
                host.model = compiled(own, ways[-1], args.mode)
    return ways


@torch.no_grad()
def run(ways: list[Way], steps: int) -> None:
    """One run of each, after steps that make all graphs."""
    sigmas = ways[0].host.sigmas(steps)
    following = [*sigmas[1:], 0.0]
    with tqdm(total=len(ways) * (2 * len(EARLIEST_AND_LATEST) + steps), unit="call") as bar:
        for way in ways:
            bar.set_postfix_str(f"{way.name}, warm-up")
            started = time.perf_counter()
            for place in EARLIEST_AND_LATEST * 2:
                way.restart(sigmas)
                way.step(sigmas[place], following[place])
                bar.update()
            way.compiled_in = time.perf_counter() - started
            way.restart(sigmas)
        graphs = [way.graphs for way in ways]
        for step in range(steps):
            for turn in range(len(ways)):
                way = ways[(turn + step) % len(ways)]
                bar.set_postfix_str(f"{way.name}, step {step + 1} of {steps}")
                way.step(sigmas[step], following[step])
                bar.update()
    if [way.graphs for way in ways] != graphs:
        raise RuntimeError(f"graphs were made in the run that was timed: {graphs}, then {[w.graphs for w in ways]}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sd15", choices=list(ARCHITECTURES))
    parser.add_argument("--size", type=int, help="pixels a side (default: the model's usual one)")
    parser.add_argument("--batch", type=int, default=1, help="images; guidance doubles them (default %(default)s)")
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES))
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 (default %(default)s)")
    parser.add_argument("--mode", default="default", choices=MODES, help="torch.compile's (default %(default)s)")
    parser.add_argument("--methods", default="default", help="presets of ours, as in tome-sampler bench; without their "
                        "threshold (default %(default)s)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=20, help="of the run (default %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    device = device_of(args.device)
    torch._dynamo.config.cache_size_limit = 64
    with threads(1), ExitStack() as stack:
        before = report.load()
        ways = ways_of(args, device, stack)
        run(ways, args.steps)
        machine = report.machine(device) | {"mode": args.mode, "load": [before, report.load()]}
        fractions = [way.merged_fraction() for way in ways]
    plain = [statistics.mean(way.seconds) for way in ways[:2]]
    common = {"arch": args.arch, "size": ways[0].host.size, "batch": args.batch, "dtype": args.dtype}
    common |= {"device": str(device), "steps": args.steps}
    results = [
        {
            "method": way.name,
            **common,
            "seconds": statistics.mean(way.seconds),
            "speedup": plain[0] / statistics.mean(way.seconds),
            "speedup_of_its_kind": plain[number % 2] / statistics.mean(way.seconds),
            "merged_fraction": fraction,
            "graphs": way.graphs,
            "warm_up_seconds": way.compiled_in,
        }
        for number, (way, fraction) in enumerate(zip(ways, fractions, strict=True))
    ]
    print(
        f"{args.arch}, {common['size']} x {common['size']}, batch {args.batch} (x 2 for guidance), {args.dtype}, "
        f"{machine['device']}, torch {torch.__version__}, mode {args.mode}, runs of {args.steps} steps, "
        f"{machine['clock']}"
    )
    print("| | seconds a step | speed-up over plain | over plain of its kind | merged | graphs | made in, s |")
    print("|---|---|---|---|---|---|---|")
    for row in results:
        merged = "" if row["merged_fraction"] is None else f"{row['merged_fraction']:.1%}"
        made = f"{row['graphs']} | {row['warm_up_seconds']:.0f}" if row["graphs"] else " | "
        print(
            f"| {row['method']} | {row['seconds']:.4g} | {row['speedup']:.2f}x | {row['speedup_of_its_kind']:.2f}x | "
            f"{merged} | {made} |"
        )
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
