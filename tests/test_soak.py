"""A thousand runs of everything that is allowed, some of which fail halfway: nothing may stay behind."""

from __future__ import annotations

import gc
import random
import resource
from typing import Any

import torch
from ldm import LdmUNet
from test_hooks import same, trace
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

from tome_sampler import MergeConfig, ModelCall, merging
from tome_sampler.hosts import modules as hosts
from tome_sampler.refresh import Always, Checkpoints, Drift, EverySteps, Once, SigmaRatio

RUNS = 1000


class Failure(Exception):
    pass


class Interrupt(BaseException):
    """Not an Exception, as Ctrl-C is not."""


def any_modules(draw: random.Random) -> tuple[str, ...]:
    return draw.choice([("block",), tuple(draw.sample(["attn1", "attn2", "ff"], draw.randint(1, 3)))])


def any_config(draw: random.Random) -> MergeConfig:
    stride = draw.choice([2, 2, 3, 4])
    destinations = draw.choice(["grid", "cell", "pool"])
    start, end = sorted((draw.random(), draw.choice([1.0, draw.random()])))
    return MergeConfig(
        stride=stride,
        ratio=draw.choice([0.0, draw.random(), 1.0]) * (1 - 1 / stride**2),
        threshold=draw.choice([None, draw.uniform(-1, 1)]),
        floor=draw.random(),
        batch_rule=draw.choice(["row", "max"]),
        destinations=destinations,
        search="global" if destinations == "pool" else draw.choice(["global", "local"]),
        random=draw.random() < 0.5,
        pool=draw.uniform(0.25, 3),
        importance=draw.uniform(0, 2),
        protect=draw.choice([0.0, draw.random()]),
        levels=draw.choice([1, 2]),
        early_ratio=draw.choice([None, draw.random() * 0.99]),
        modules=any_modules(draw),
        early_modules=draw.choice([None, any_modules(draw)]),
        min_tokens=draw.choice([0, 0, 30]),
        neighbourhood=draw.choice([1, 2]),
        metric=draw.choice(["attention", "block"]),
        share_branches=draw.random() < 0.5,
        share_layers=draw.random() < 0.5,
        refresh=draw.choice([Always(), Once(), SigmaRatio(1.5), EverySteps(2), Checkpoints((0.5,)), Drift(0.01)]),
        start=draw.choice([0.0, start]),
        end=end,
        prune_until=draw.choice([0.0, draw.random()]),
        proportional=draw.random() < 0.5,
        seed=draw.randrange(1000),
    )


def any_run(model: LdmUNet, draw: random.Random) -> None:
    """Three steps of one session, in any layout; now and then the first block fails."""
    images, h, w = draw.randint(1, 2), draw.randint(1, 7), draw.randint(1, 7)
    branches = draw.choice([("cond",), ("uncond", "cond"), ("cond", "cond", "uncond")])
    failing = draw.choice([None, None, None, Failure, Interrupt])
    told, guided = draw.random() < 0.7, draw.random() < 0.7
    x, b = torch.randn(images * len(branches), 4, h, w), images * len(branches)
    with merging(model, any_config(draw), branches=draw.choice([None, branches])) as session:
        for step, sigma in enumerate((8.0, 3.0, 2.9)):
            fails = failing is not None and step == 1

            def fail(*args: Any, error: Any = failing, fails: bool = fails) -> None:
                if fails:
                    raise error

            place = draw.choice([model.first.attn1.to_v, model.deep.ff, model.last.attn1])  # type: ignore[union-attr]
            with place.register_forward_hook(fail), torch.no_grad():
                if told:
                    with session.call(ModelCall.chunked(sigma, (h, w), branches, images)):
                        out = model(x, torch.full((b,), sigma), None)
                else:
                    out = model(x, torch.full((b,), sigma * 100), None)
            assert out.shape == x.shape
            assert torch.isfinite(out).all()
            if guided:
                session.observe(out[:images], -out[:images])
        session.stats.to_dict()


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def test_a_thousand_random_runs_leave_nothing_behind() -> None:
    draw = random.Random(0)
    model = LdmUNet(channels=4, context=4).eval().requires_grad_(False)
    probe = torch.randn(2, 4, 6, 6)
    plain, before = model(probe, torch.full((2,), 5.0)), trace(model)
    kept, memory, failed = 0, 0, 0
    for run in range(RUNS):
        try:
            any_run(model, draw)
        except (Failure, Interrupt):
            failed += 1
        if run == RUNS // 5:  # warm
            kept, memory = tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert failed > RUNS // 5
    assert tensors() <= kept
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 64 << 10  # KiB
    assert same(before, trace(model))
    assert torch.equal(model(probe, torch.full((2,), 5.0)), plain)
    assert _get_current_function_mode_stack() == []
    assert not hosts._attached
