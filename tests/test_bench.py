"""`tome-sampler bench`: what is measured is what is said to be. Never how fast it is."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_feedforward import watched
from test_hooks import same, trace
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from tqdm import tqdm

from tome_sampler import MergeConfig, MergeSession, Pairing
from tome_sampler.attention import proportional_attention
from tome_sampler.bench import memory, report
from tome_sampler.bench.architectures import ARCHITECTURES, Architecture, build
from tome_sampler.bench.chosen import EVERYTHING, choose
from tome_sampler.bench.command import add_arguments
from tome_sampler.bench.host import Host
from tome_sampler.bench.limits import Bound, Plan, Plans, ZeroOverhead, plan_of, record
from tome_sampler.bench.methods import PLAIN, Merged, Method, Stacked
from tome_sampler.bench.parts import profiled
from tome_sampler.bench.peers import CaTome, DeepCache, TomeSd, threshold_for
from tome_sampler.bench.rounds import Rounds, rotated
from tome_sampler.bench.rows import rows_of
from tome_sampler.bench.settings import Settings
from tome_sampler.bench.timing import Taken
from tome_sampler.cli import main
from tome_sampler.hosts.families import mergeable
from tome_sampler.importance import cfg_magnitude
from tome_sampler.refresh import Drift

KEYS = {
    *("method", "arch", "size", "batch", "dtype", "device", "backend", "seconds", "speedup"),
    *("share_of_bound", "overhead_refresh", "overhead_reuse", "peak_mb"),
}
SIGMA = 2.0
HALF = MergeConfig(ratio=0.5, threshold=None, early_ratio=None, min_tokens=0)
EARLY = HALF.with_(early_ratio=0.75)  # while sigma is above 3: in the first 7 of 20 steps


@pytest.fixture(scope="module")
def host() -> Host:
    model = build("tiny", torch.float32, torch.device("cpu"), seed=0)
    return Host("tiny", ARCHITECTURES["tiny"], model, size=128, batch=1)


@pytest.fixture(scope="module")
def inputs(host: Host) -> tuple[Tensor, Tensor]:
    return host.inputs(host.noise * SIGMA, SIGMA)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """One run through the command line: its JSON and its table."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = ["bench", "--arch", "tiny", "--methods", "plain,bound,tomesd,default", "--repeats", "2", "--steps", "3"]
    files = ["--json", str(folder / "bench.json"), "--markdown", str(folder / "bench.md")]
    assert main([*arguments, "--quiet", *files]) == 0
    return json.loads((folder / "bench.json").read_text()), (folder / "bench.md").read_text()


def rows(written: tuple[dict[str, Any], str], kind: str) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in written[0]["results"] if row["kind"] == kind}


def test_json_has_a_row_for_each_method_with_every_key(written: tuple[dict[str, Any], str]) -> None:
    data, table = written
    assert data.keys() == {"machine", "results"}
    limits = {"plain", "bound", "zero_overhead:tomesd"}  # tomesd's keys do not gain log(size)
    phases = {f"default/{phase}" for phase in ("early refresh", "early reuse", "refresh", "reuse")}
    free = {"zero_overhead/early", "zero_overhead/later"}
    assert rows(written, "step").keys() == {*limits, "tomesd", *phases, *free}
    assert rows(written, "run").keys() == {*limits, "tomesd", "default", "zero_overhead"}
    assert rows(written, "composed").keys() == {"default", "zero_overhead"}
    for row in data["results"]:
        assert row.keys() >= KEYS
        assert (row["arch"], row["size"], row["batch"], row["dtype"], row["device"]) == ("tiny", 128, 1, "fp32", "cpu")
        assert row["seconds"] > 0
        assert f"| {row['method']} |" in table
    assert data["machine"]["clock"] == "process CPU time"
    assert "random weights" in " ".join(data["machine"]["notes"])


def test_figures_follow_from_each_other(written: tuple[dict[str, Any], str]) -> None:
    steps, runs = rows(written, "step"), rows(written, "run")
    assert steps["plain"]["speedup"] == runs["plain"]["speedup"] == 1
    assert steps["zero_overhead/early"]["share_of_bound"] == steps["zero_overhead/later"]["share_of_bound"] == 1
    for name in ("default/early refresh", "default/early reuse", "default/refresh", "default/reuse"):
        phase = name.removeprefix("default/").removeprefix("early ")
        assert steps[name]["share_of_bound"] == pytest.approx(1 - steps[name][f"overhead_{phase}"], abs=0.2)
    assert steps["tomesd"]["overhead_reuse"] is None  # it never does
    run = runs["default"]
    assert run["speedup"] == pytest.approx(runs["plain"]["seconds"] / run["seconds"])
    assert run["share_of_bound"] == pytest.approx(runs["zero_overhead"]["seconds"] / run["seconds"])
    assert run["seconds_run"] == pytest.approx(3 * run["seconds"])


def test_steps_that_reuse_pairs_match_nothing(written: tuple[dict[str, Any], str]) -> None:
    steps = rows(written, "step")
    refresh, reuse = (steps[f"default/{phase}"]["launches_per_layer"] for phase in ("refresh", "reuse"))
    assert refresh["matching"] > reuse["matching"] == 0
    assert reuse["merge"] > 0
    assert reuse["unmerge"] > 0
    assert steps["tomesd"]["launches_per_layer"]["matching"] > 0
    assert steps["default/early reuse"]["launches_per_layer"]["matching"] == 0
    assert steps["default/reuse"]["merged_fraction"] == steps["tomesd"]["merged_fraction"] == 0.5
    assert steps["default/early reuse"]["merged_fraction"] == 0.75
    assert rows(written, "run")["default"]["steps_with_new_pairs"] == 3  # in three steps, sigma falls fast
    assert rows(written, "run")["default"]["merged_fraction"] == pytest.approx((0.75 + 2 * 0.5) / 3)


class Noted(Method):
    """A method that notes its calls."""

    def __init__(self, name: str, host: Host, calls: list[str]) -> None:
        super().__init__(name, host)
        self._calls = calls

    def call(self, inputs: tuple[Tensor, Tensor], sigma: float, step: int) -> Tensor:
        self._calls.append(self.name)
        return super().call(inputs, sigma, step)


def test_methods_take_turns(host: Host) -> None:
    assert [rotated("abc", n) for n in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    calls: list[str] = []
    methods = [Noted(name, host, calls) for name in "abc"]
    *_, found = Rounds(host, methods, repeats=3, steps=[2], bound=False).measure(tqdm(disable=True))
    # a warm-up round, three timed ones, one under the profiler, a run of two steps
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc" + "abc" + "bca"
    assert {name: len(taken) for name, taken in found.steps.items()} == {"a": 3, "b": 3, "c": 3}
    assert {name: len(taken) for name, taken in found.runs[2].items()} == {"a": 2, "b": 2, "c": 2}


class Watched(Merged):
    """Our merging, which notes each step that is measured alone."""

    def begin(self, phase: str, sigma: float) -> None:
        super().begin(phase, sigma)
        self.phase = phase

    def call(self, inputs: tuple[Tensor, Tensor], sigma: float, step: int) -> Tensor:
        with attention_seen(self.host.model) as seen:
            out = super().call(inputs, sigma, step)
        assert inputs[1] == self.host.timestep(sigma)
        self.noted.add((self.phase, sigma, self.counted()[0] > 0, max(tokens for tokens, _ in seen.values())))
        return out


def test_each_kind_of_step_is_measured_in_its_part_of_the_run(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    sigmas = host.sigmas(20)
    ours = Watched("default", host, EARLY)
    ours.noted = set()
    turns = 7  # plain, two of zero_overhead, four of ours: every one is once the first of its round
    *_, found = Rounds(host, [Method("plain", host), ours], repeats=turns, steps=[], bound=False).measure(
        tqdm(disable=True)
    )
    assert {len(taken) for taken in found.steps.values()} == {turns}
    assert sigmas[6] > EARLY.early_sigma > sigmas[7]
    assert ours.noted == {
        ("early refresh", sigmas[6], True, 64),
        ("early reuse", sigmas[6], False, 64),
        ("refresh", sigmas[8], True, 128),
        ("reuse", sigmas[8], False, 128),
    }
    lengths = {part: {short.shape[1] for short in plan.values()} for part, plan in found.plans["default"].parts.items()}
    assert lengths == {"early": {64}, "later": {128}}
    assert Merged("half", host, HALF).phases == ("refresh", "reuse")
    assert Merged("half", host, HALF).place("refresh") == Method("plain", host).place("") == 8


def made_up(host: Host, config: MergeConfig, seconds: dict[str, float]) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows by method and number of steps, as if single steps had taken so long."""
    methods = [Method("plain", host), Merged("default", host, config)]
    *_, found = Rounds(host, methods, repeats=1, steps=[], bound=True).measure(tqdm(disable=True))
    assert found.steps.keys() == seconds.keys()
    found.steps = {name: [Taken(s, s), Taken(2 * s, 2 * s)] for name, s in seconds.items()}
    return {(row["method"], row["steps"]): row for row in rows_of(found, {})}


def test_a_run_is_put_together_of_all_kinds_of_steps_in_it(host: Host) -> None:
    seconds = {"plain": 10.0, "bound": 1.0, "zero_overhead/early": 2.0, "zero_overhead/later": 5.0}
    seconds |= {f"default/{phase}": s for phase, s in (("early refresh", 4.0), ("early reuse", 3.0))}
    seconds |= {f"default/{phase}": s for phase, s in (("refresh", 7.0), ("reuse", 6.0))}
    found = made_up(host, EARLY, seconds)
    row, zero = found["default", 20], found["zero_overhead", 20]
    # of 20 steps 7 are early; of these, two make pairs, and of the rest, four
    own, free = (2 * 4 + 5 * 3 + 4 * 7 + 9 * 6) / 20, (7 * 2 + 13 * 5) / 20
    assert row["seconds"] == pytest.approx(1.5 * own)  # the median of two rounds, one twice as long
    assert zero["seconds"] == pytest.approx(1.5 * free)
    assert row["speedup"] == pytest.approx(10 / own)
    assert row["share_of_bound"] == pytest.approx(free / own)
    assert zero["share_of_bound"] == 1
    assert found["plain", 1]["share_of_bound"] == pytest.approx(free / 10)
    assert row["steps_with_new_pairs"] == 6
    assert row["overhead_refresh"] == pytest.approx((2 * (1 - 2 / 4) + 4 * (1 - 5 / 7)) / 6)
    assert row["overhead_reuse"] == pytest.approx((5 * (1 - 2 / 3) + 9 * (1 - 5 / 6)) / 14)
    assert row["merged_fraction"] == pytest.approx((7 * 0.75 + 13 * 0.5) / 20)
    early, later = found["default/early refresh", 1], found["default/reuse", 1]
    assert early["share_of_bound"] == pytest.approx(2 / 4)
    assert early["overhead_refresh"] == pytest.approx(1 - 2 / 4)
    assert later["share_of_bound"] == pytest.approx(5 / 6)
    assert later["overhead_reuse"] == pytest.approx(1 - 5 / 6)
    assert found["default", 50]["seconds"] != row["seconds"]


@pytest.mark.parametrize(
    ("modules", "early"), [(("attn1",), ("block",)), (("attn1", "ff"), ("attn1",)), (("block",), ("attn2", "ff"))]
)
def test_what_is_merged_counts_once_for_a_block_whichever_of_its_parts_it_is(
    host: Host, modules: tuple[str, ...], early: tuple[str, ...]
) -> None:
    methods = [Method("plain", host), Merged("default", host, EARLY.with_(modules=modules, early_modules=early))]
    *_, found = Rounds(host, methods, repeats=1, steps=[], bound=False).measure(tqdm(disable=True))
    rows = {(row["method"], row["steps"]): row for row in rows_of(found, {})}
    assert rows["default", 20]["merged_fraction"] == pytest.approx((7 * 0.75 + 13 * 0.5) / 20)


def test_a_run_is_plain_where_nothing_is_merged(host: Host) -> None:
    seconds = {"plain": 10.0, "bound": 1.0, "zero_overhead": 5.0, "default/refresh": 7.0, "default/reuse": 6.0}
    found = made_up(host, HALF.with_(end=0.5), seconds)
    row = found["default", 20]
    made = row["steps_with_new_pairs"]
    assert 0 < made < 10
    own, free = (made * 7 + (10 - made) * 6 + 10 * 10) / 20, (10 * 5 + 10 * 10) / 20
    assert row["seconds"] == pytest.approx(1.5 * own)
    assert row["share_of_bound"] == pytest.approx(free / own)
    assert found["default/reuse", 1]["share_of_bound"] == pytest.approx(5 / 6)
    assert row["merged_fraction"] == pytest.approx(0.25)


@pytest.mark.parametrize("config", [EARLY.with_(end=0.6), EARLY.with_(refresh=Drift(0.1))])
def test_what_a_run_loses_is_of_its_own_steps(host: Host, config: MergeConfig) -> None:
    """Each beside the same step of its zero_overhead, whatever single steps take; also where drift decides."""
    pytest.importorskip("tomesd")
    methods = [Method("plain", host), Merged("default", host, config), TomeSd("tomesd", host, {"ratio": 0.5})]
    *_, found = Rounds(host, methods, repeats=1, steps=[10], bound=False).measure(tqdm(disable=True))
    kinds = found.kinds[10]["default"]
    assert kinds[0] == "refresh"
    assert len(kinds) == 10
    assert "reuse" in kinds
    assert found.kinds[10]["tomesd"] == ["refresh"] * 10
    own = {"refresh": 4.0, "reuse": 2.0, PLAIN: 1.0}
    found.runs[10] = {name: [Taken(1.0, 1.0)] * 10 for name in found.runs[10]}
    found.runs[10]["default"] = [Taken(own[kind] + (step == 0), 1.0) for step, kind in enumerate(kinds)]
    rows = {row["method"]: row for row in rows_of(found, {}) if row["kind"] == "run"}
    made = kinds.count("refresh")
    assert rows["default"]["steps_with_new_pairs"] == made
    assert rows["default"]["overhead_refresh"] == pytest.approx((0.8 + (made - 1) * 0.75) / made)
    assert rows["default"]["overhead_reuse"] == pytest.approx(0.5)
    assert rows["tomesd"]["overhead_refresh"] == 0
    assert rows["tomesd"]["overhead_reuse"] is None  # it has no such steps
    assert rows["plain"]["overhead_refresh"] is rows["zero_overhead"]["overhead_reuse"] is None


def test_a_share_is_of_what_the_same_settings_could_reach(host: Host) -> None:
    """Of plain, of the first one; none where nothing gets shorter, as in other packages' tiles and caches."""
    early = Merged("late", host, HALF.with_(start=0.5, modules=("block",)))
    methods = [Method("plain", host), Merged("default", host, HALF), early, Method("hypertile", host)]
    *_, found = Rounds(host, methods, repeats=1, steps=[4], bound=True).measure(tqdm(disable=True))
    seconds = {"plain": 8.0, "bound": 1.0, "bound:late": 2.0, "zero_overhead": 4.0, "zero_overhead:late": 6.0}
    seconds |= {"default": 5.0, "late": 7.0, "hypertile": 3.0}
    assert {method.name for method in found.methods} == seconds.keys()
    for taken in (found.steps, found.runs[4]):
        for name in taken:
            taken[name] = [Taken(seconds[name.partition("/")[0]], 1.0)] * len(taken[name])
    expected = {"plain": 4 / 8, "bound": 4 / 1, "bound:late": 6 / 2, "zero_overhead": 1.0, "zero_overhead:late": 1.0}
    expected |= {"default": 4 / 5, "late": 6 / 7, "hypertile": None}
    rows = rows_of(found, {})
    assert {row["method"]: row["share_of_bound"] for row in rows if row["kind"] == "run"} == pytest.approx(expected)
    for row in (row for row in rows if row["kind"] == "step"):
        assert row["share_of_bound"] == pytest.approx(expected[row["method"].partition("/")[0]])
        assert row["zero_overhead"] in (None, "zero_overhead", "zero_overhead:late")
        assert (row["zero_overhead"] is None) == (row["method"] == "hypertile")


@contextmanager
def attention_seen(model: nn.Module) -> Iterator[dict[str, tuple[int, bool]]]:
    """How many tokens each self-attention projects, and whether log(size) is in force."""
    seen: dict[str, tuple[int, bool]] = {}
    layers = {n: m for n, m in model.named_modules() if n.endswith("attn1.to_q")}

    def see(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            modes = _get_current_function_mode_stack()
            seen[name] = args[0].shape[1], any(isinstance(mode, proportional_attention) for mode in modes)

        return hook

    hooks = [module.register_forward_pre_hook(see(name)) for name, module in layers.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("proportional", [True, False])
def test_zero_overhead_does_the_attention_of_its_method_and_no_more(
    host: Host, inputs: tuple[Tensor, Tensor], proportional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Merged("default", host, HALF.with_(proportional=proportional))
    ours.begin("refresh", SIGMA)
    with torch.no_grad(), attention_seen(host.model) as merged:
        plain, _ = record(Method("plain", host), inputs, SIGMA, 0)
        seen, _ = record(ours, inputs, SIGMA, 0)
    plans = Plans({"later": plan_of(seen, plain)})
    zero, bound = ZeroOverhead("zero_overhead", ours, plans), Bound("bound", ours, plans)
    for limit in (zero, bound):
        limit.begin("", SIGMA)
    for owner, name in ((MergeSession, "merge"), (Pairing, "merge"), (Pairing, "unmerge")):
        monkeypatch.delattr(owner, name)  # neither may be needed
    with torch.no_grad(), attention_seen(host.model) as free, zero.on():
        out = zero.call(inputs, SIGMA, 0)
    assert free == merged
    assert {tokens for tokens, _ in free.values()} == {128, 64}  # half of 256 on the finest level, 64 on the next
    assert {mode for tokens, mode in free.values() if tokens == 128} == {proportional}
    assert out.shape == (2, 4, 16, 16)
    with torch.no_grad(), attention_seen(host.model) as left, bound.on():
        bound.call(inputs, SIGMA, 0)
    assert {tokens for tokens, _ in left.values()} == {64}  # the merged layers do not even project


@torch.no_grad()
def test_zero_overhead_halves_the_feed_forward_where_its_method_does(host: Host, inputs: tuple[Tensor, Tensor]) -> None:
    ours = Merged("default", host, HALF)
    plans = Plans({"later": plan_in(ours, "refresh", SIGMA)})
    methods = [ours, ZeroOverhead("zero_overhead", ours, plans), Bound("bound", ours, plans)]
    lengths = watched(host.model)
    seen = []
    for method in methods:
        method.begin("refresh" if method is ours else "", SIGMA)
        with method.on():
            method.call(inputs, SIGMA, 0)
        seen.append({n for of_one in lengths.values() for n in of_one})
        lengths.clear()
    assert seen == [{128, 64}, {128, 64}, {256, 64}]  # the bound leaves it as it is
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.model.modules())


def plan_in(method: Method, phase: str, sigma: float) -> Plan:
    """What a method makes of a step."""
    host = method.host
    inputs = host.inputs(host.noise * sigma, sigma)
    plain, _ = record(Method("plain", host), inputs, sigma, 0)
    method.begin(phase, sigma)
    return plan_of(record(method, inputs, sigma, 0)[0], plain)


@torch.no_grad()
def test_limits_follow_the_parts_of_a_run(host: Host) -> None:
    ours, sigmas = Merged("default", host, EARLY), host.sigmas(5)
    plans = Plans({"early": plan_in(ours, "early refresh", 9.0), "later": plan_in(ours, "refresh", SIGMA)})
    zero, bound = ZeroOverhead("zero_overhead", ours, plans), Bound("bound", ours, plans)
    assert zero.phases == ("early", "later")
    assert bound.phases == ("",)  # the same layers in both
    for method in (ours, zero, bound):
        method.restart(sigmas)
    lengths = []
    for step, sigma in enumerate(sigmas):
        seen = []
        for method in (ours, zero, bound):
            with method.on(), attention_seen(host.model) as layers:
                method.call(host.inputs(host.noise * sigma, sigma), sigma, step)
            seen.append(layers)
        assert seen[0] == seen[1]
        assert {tokens for tokens, _ in seen[2].values()} == {64}  # the coarse level's
        lengths.append(sum(tokens == 128 for tokens, _ in seen[0].values()))
    merged = len(plans.parts["later"])
    assert lengths == [0, 0, merged, merged, merged]


def test_lengths_that_depend_on_the_picture_are_found_for_each_step(host: Host) -> None:
    methods = [Method("plain", host), Merged("default", host, EARLY.with_(threshold=1.0, floor=0.25))]
    bar = tqdm(file=io.StringIO())
    stages = [(f, bar.total - bar.n) for f in Rounds(host, methods, repeats=1, steps=[5], bound=False).measure(bar)]
    assert [to_come for _, to_come in stages] == [3 * 5, 0]  # plain, the limit and ours
    found, _ = stages[-1]
    plans = found.plans["default"].runs[5]
    assert [{short.shape[1] for short in plan.values()} for plan in plans] == [{64}, {64}, {192}, {192}, {192}]
    row = next(row for row in rows_of(found, {}) if row["kind"] == "run" and row["method"] == "default")
    assert row["merged_fraction"] == pytest.approx((2 * 0.75 + 3 * 0.25) / 5)
    assert "what default can merge depends on the picture" in " ".join(found.notes)


@torch.no_grad()
def test_methods_share_a_limit_only_if_it_does_the_same_in_a_run(host: Host) -> None:
    def zero(config: MergeConfig) -> Any:
        ours = Merged("ours", host, config)
        plans = Plans({"early": plan_in(ours, "early refresh", 9.0), "later": plan_in(ours, "refresh", 0.5)})
        return ZeroOverhead("zero_overhead", ours, plans).work_in_runs([4])

    assert zero(EARLY) == zero(EARLY.with_(seed=1))
    assert zero(EARLY) != zero(EARLY.with_(early_sigma=1.0))
    assert zero(EARLY) != zero(EARLY.with_(early_ratio=0.6))


def everything(host: Host) -> list[Method]:
    methods = [Merged("default", host, HALF), Merged("ca_tome", host, HALF.with_(metric="block", proportional=False))]
    plans = Plans({"later": plan_in(methods[0], "refresh", SIGMA)})
    return [*methods, Bound("bound", methods[0], plans), ZeroOverhead("zero_overhead", methods[0], plans)]


@torch.no_grad()
def test_methods_leave_the_model_as_it_was_and_keep_what_they_know(host: Host, inputs: tuple[Tensor, Tensor]) -> None:
    pytest.importorskip("tomesd")
    pytest.importorskip("ca_tome")
    methods = [
        *everything(host),
        TomeSd("tomesd", host, {"ratio": 0.5}),
        CaTome("ca-tome", host, {"r": threshold_for(0.5, host, inputs)}),
    ]
    before, plain = trace(host.model), host(inputs)
    for method in methods:
        for phase in method.phases:
            method.begin(phase, SIGMA)
            with method.on():
                assert not same(before, trace(host.model)), f"{method.name} does nothing"
                out = method.call(inputs, SIGMA, 0)
            assert not torch.equal(out, plain), f"{method.name} does nothing"
            assert same(before, trace(host.model)), f"{method.name} leaves a trace"
            assert torch.equal(host(inputs), plain)
        with pytest.raises(KeyboardInterrupt), method.on():
            raise KeyboardInterrupt
        assert same(before, trace(host.model)), f"{method.name} leaves a trace after an exception"


@torch.no_grad()
def test_ca_tome_merges_as_much_as_it_is_asked_to_and_keeps_its_pairs(
    host: Host, inputs: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ca_tome")
    method = CaTome("ca-tome", host, {"r": threshold_for(0.5, host, inputs), "use_rand": False})
    plan = plan_in(method, "refresh", SIGMA)
    kept = sum(short.shape[1] for short in plan.values()) / sum(short.tokens for short in plan.values())
    assert kept == pytest.approx(0.5, abs=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "argsort", None)  # matching sorts; reuse must not
        assert plan_in(method, "reuse", SIGMA).keys() == plan.keys()
    phases = method.phases_in([1.0] * 20)
    assert [step for step, phase in enumerate(phases, 1) if phase == "refresh"] == [1, 8, 11, 13, 20]
    assert phases.count("reuse") == 15


@pytest.mark.parametrize("config", [HALF, EARLY, EARLY.with_(start=0.1, end=0.8)])
def test_a_run_makes_pairs_as_often_as_the_policy_says(host: Host, config: MergeConfig) -> None:
    ours = Merged("default", host, config)
    sigmas = host.sigmas(20)
    assert sigmas == sorted(sigmas, reverse=True)
    ours.restart(sigmas)
    phases = ours.phases_in(sigmas)
    with torch.no_grad():
        for step, sigma in enumerate(sigmas):
            with ours.on(), attention_seen(host.model) as seen:
                ours.call(host.inputs(host.noise * sigma, sigma), sigma, step)
            made, reused = ours.counted()
            kind = "refresh" if made else "reuse" if reused else PLAIN
            lengths = {"early": [64, 64], "refresh": [64, 128], "reuse": [64, 128], PLAIN: [64, 256]}
            first = phases[step].partition(" ")[0]
            assert phases[step] == (f"early {kind}" if first == "early" else kind)
            assert sorted({tokens for tokens, _ in seen.values()}) == sorted(set(lengths[first]))
    assert ours.kinds_in_run() == [phase.removeprefix("early ") for phase in phases]
    assert 1 < ours.kinds_in_run().count("refresh") < 20
    assert set(phases) == {*ours.phases, *([PLAIN] if config.end < 1 else [])}
    assert Merged("always", host, HALF.with_(refresh=MergeConfig.preset("importance").refresh)).phases == ("refresh",)


def test_a_package_that_fails_costs_its_row_only(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tomesd")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise TypeError("no such argument")

    monkeypatch.setattr("tomesd.apply_patch", fail)
    methods = [Method("plain", host), TomeSd("tomesd", host, {})]
    *_, found = Rounds(host, methods, repeats=1, steps=[], bound=True).measure(tqdm(disable=True))
    assert found.steps.keys() == {"plain"}
    assert found.notes == ["tomesd does not run on tiny: TypeError: no such argument"]


def test_peak_memory_counts_what_is_held_at_once() -> None:
    held: list[Tensor] = []

    def call() -> None:
        a = torch.zeros(1000, 1000)
        del a
        b, c = torch.zeros(500, 1000), torch.zeros(700, 1000)
        held.append(b + c[:500])

    cost, left = profiled(call, torch.device("cpu"), before=10)
    assert cost.peak == pytest.approx(10 + 4 * (500 + 700 + 500) * 1000, rel=0.01)
    assert left == pytest.approx(10 + 4 * 500 * 1000, rel=0.01)


@torch.no_grad()
def test_deepcache_alone_and_below_a_preset(host: Host) -> None:
    """Every third step of a run is whole, and merging is at work in all of them."""
    pytest.importorskip("DeepCache")
    cache, merged, sigmas = DeepCache("deepcache", host), Merged("default", host, HALF), host.sigmas(5)
    before, whole = trace(host.model), []
    for method in (cache, Stacked("default+deepcache", cache, merged)):
        whole.clear()
        method.restart(sigmas)
        for step, sigma in enumerate(sigmas):
            with method.on():
                hook = host.model.mid_block.resnets[0].register_forward_hook(lambda *_, step=step: whole.append(step))
                out = method.call(host.inputs(host.noise * sigma, sigma), sigma, step)
                hook.remove()
            assert out.isfinite().all()
        assert whole == [0, 3]
        assert same(before, trace(host.model))
    assert method.kinds_in_run() == merged.phases_in(sigmas)
    assert PLAIN not in merged.phases_in(sigmas)


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        ("plain,tomesd,default", ["tomesd", "default"]),
        ("default:ratio=0.7,stride=4,quality", ["default:ratio=0.7,stride=4", "quality"]),
        ("fast:refresh=sigma_3", ["fast:refresh=sigma_3"]),
    ],
)
def test_methods_are_given_with_commas(given: str, labels: list[str]) -> None:
    chosen, bound, notes = choose(given, quick=False, runs=False)
    assert [method.label for method in chosen] == labels
    assert not bound
    assert not notes


def test_by_default_what_is_not_installed_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("tomesd", "ca_tome", "DeepCache", "hyper_tile"):
        monkeypatch.setitem(sys.modules, package, None)
    chosen, bound, notes = choose(None, quick=False, runs=True)
    assert [method.name for method in chosen] == ["ca_tome", "default"]
    assert bound
    assert len(chosen) + len(notes) + 3 == len(EVERYTHING)
    assert "deepcache is not in the table: the package DeepCache was not installed" in notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sd3"], "arch is 'sd3'; it must be one of sd15, sd21, sdxl, pixart, animatediff, embedded, tiny"),
        (["--size", "500"], "size is '500'; it must be a multiple of 64 from 512 to 2048"),
        (["--size", "4096"], "size is '4096'; it must be a multiple of 64 from 512 to 2048"),
        (
            ["--arch", "embedded", "--size", "48"],
            "it must be a multiple of 64 from 512 to 2048 or a multiple of 32 from 32",
        ),
        (
            ["--arch", "embedded", "--size", "512,1024"],
            "size is 512,1024; with arch embedded it must be a multiple of 32 from 32 to 256",
        ),
        (["--batch", "0"], "batch is '0'; it must be a whole number from 1 to 64"),
        (["--frames", "4"], "frames is 4; it must be left out with arch tiny"),
        (["--arch", "animatediff", "--frames", "33"], "frames is 33; it must be from 1 to 32"),
        (["--dtype", "int8"], "dtype is 'int8'; it must be one of fp32, bf16, fp16"),
        (["--device", "tpu"], "device is 'tpu'; it must be cpu, cuda or cuda:NUMBER"),
        (["--device", "cuda:99"], "device is 'cuda:99'; torch sees"),
        (["--backend", "fast"], "backend is 'fast'; it must be one of auto, flash, efficient, math, xformers"),
        (["--ratio", "1.5"], "ratio is 1.5; it must be from 0 to 0.9375"),
        (["--ratio", "0.9", "--methods", "tomesd"], "ratio is 0.9; with tomesd, which never merges more"),
        (["--methods", "tomseed"], "method is 'tomseed'; it must be one of plain, bound, zero_overhead, tomesd"),
        (["--methods", "default,default"], "it must name each one once"),
        (["--methods", "plain,bound"], "methods is 'plain,bound'; with bound it must name a method that merges"),
        (["--methods", "bound,zero_overhead"], "with bound and zero_overhead it must name a method that merges, e.g."),
        (["--methods", "default:ratio"], "override is 'ratio'; it must be field=value"),
        (["--methods", "default:ratio=0.8"], "ratio is 0.8; it must be a number from 0 to 0.75"),
        (["--methods", "default:refresh=often"], "refresh is 'often'; it must be 'always', 'once'"),
        (["--methods", "plain:ratio=0.5"], "plain takes no overrides"),
        (["--methods", "deepcache:cache_interval=5", "--steps", "2"], "deepcache takes no overrides"),
        (["--methods", "tomesd:ratio=0.9"], "ratio of tomesd is 0.9; it must be a number from 0 to 0.75"),
        (["--methods", "ca-tome:r=x"], "r of ca-tome is 'x'; it must be a number from -1 to 1"),
        (["--calibrate", "--json", "gate.json"], "--calibrate writes its own table"),
        (["--calibrate", "--backend", "xformers"], "backend is 'xformers'; it must be one of auto, flash"),
        (["--modules", "attn3"], "modules is 'attn3'; it must be one of attn1"),
        (["--steps", "1"], "steps is 1; it must be 0"),
        (["--repeats", "0"], "repeats is 0; it must be from 1 to 1000"),
        (["--threads", "0"], "threads is 0; it must be from 1"),
        (["--seed", "-1"], "seed is -1; it must be from 0 to 4294967295"),
        (["--seed", "4294967296"], "seed is 4294967296; it must be from 0 to 4294967295"),
        (["--checkpoint", "none.safetensors"], "arch is tiny; with a checkpoint it must be one of sd15, sd21, sdxl"),
        (
            ["--arch", "pixart", "--checkpoint", "none.safetensors"],
            "arch is pixart; with a checkpoint it must be one of",
        ),
        (["--arch", "sd15", "--checkpoint", "none.safetensors"], "checkpoint is 'none.safetensors'; it must be"),
        (["--json", "no/such/folder/bench.json"], "there is no folder no/such/folder"),
        (["--markdown", "tests"], "markdown is 'tests'; it cannot be written: it is a folder"),
        (["--json", "/dev/null"], "json is '/dev/null'; it cannot be written: it is no regular file"),
        (["--json", "/proc/bench.json"], "it cannot be written: nothing can be written into /proc"),
    ],
)
def test_what_the_user_gets_wrong_is_said_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--arch", "tiny", "--quiet", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "it cannot be written: it is a folder"),
        ("bench", "its suffix must be one of ."),
        ("bench.docx", "its suffix must be one of ."),
    ],
)
def test_a_picture_that_cannot_be_written_is_said_to_be_before_anything_is_measured(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("tome_sampler.bench.measure.measure", None)
    assert main(["bench", "--arch", "tiny", "--quiet", "--plot", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert f"plot is '{tmp_path / name}'; {message}" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}.*"))


@pytest.mark.parametrize(
    ("package", "arguments", "message"),
    [
        ("tomesd", ["--methods", "plain,tomesd"], "pip install --no-deps tomesd"),
        ("DeepCache", ["--methods", "default+deepcache", "--steps", "2"], "pip install --no-deps DeepCache"),
        ("matplotlib", ["--plot", "bench.png"], "--plot needs matplotlib, which is not installed"),
    ],
)
def test_a_missing_package_is_named_before_anything_is_measured(
    package: str,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["bench", "--arch", "tiny", "--quiet", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_each_model_is_measured_at_the_sizes_that_it_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The embedded one at small ones, too, where its layers are left alone, and never in silence at another one."""
    arguments = [
        "bench",
        "--arch",
        "embedded,tiny",
        "--size",
        "32",
        "--methods",
        "default",
        "--repeats",
        "1",
        "--quiet",
    ]
    assert main([*arguments, "--json", str(tmp_path / "bench.json")]) == 0
    data = json.loads((tmp_path / "bench.json").read_text())
    assert {(row["arch"], row["size"]) for row in data["results"]} == {("embedded", 32), ("tiny", 128)}
    assert {"plain", "default"} == {row["method"].partition("/")[0] for row in data["results"] if row["size"] == 32}
    assert "tiny cannot be measured at 32 pixels: it is at 128" in data["machine"]["notes"]
    assert "default merges nothing in embedded at 32 pixels" in data["machine"]["notes"]
    assert sum("256 tokens are left alone" in note for note in data["machine"]["notes"]) == 1
    assert not caplog.records  # nor from each of the sessions that it takes


def test_pairs_that_are_made_anew_by_what_is_seen_are_noted(host: Host) -> None:
    methods = [Method("plain", host), Merged("default", host, HALF.with_(refresh=Drift(0.1)))]
    *_, found = Rounds(host, methods, repeats=1, steps=[], bound=False).measure(tqdm(disable=True))
    assert any(note.startswith("when default make pairs anew depends on the picture") for note in found.notes)


def test_a_package_that_fails_later_costs_its_row_only(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tomesd")
    method, steps = TomeSd("tomesd", host, {}), []

    def fail(*args: Any) -> Tensor:
        steps.append(args)
        if len(steps) > 1:
            raise RuntimeError("no more")
        return Method.call(method, *args)

    monkeypatch.setattr(method, "call", fail)
    *_, found = Rounds(host, [Method("plain", host), method], repeats=2, steps=[], bound=False).measure(
        tqdm(disable=True)
    )
    assert found.notes == ["tomesd does not run on tiny: RuntimeError: no more"]
    assert "tomesd" not in {row["method"] for row in rows_of(found, {})}
    assert len(found.steps["plain"]) == 2


def test_what_does_not_fit_into_memory_costs_its_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [
        "bench",
        "--arch",
        "tiny,sdxl",
        "--quick",
        "--methods",
        "plain",
        "--quiet",
        "--json",
        str(tmp_path / "b.json"),
    ]
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**30)
    assert main(given) == 0
    written = json.loads((tmp_path / "b.json").read_text())
    assert {row["arch"] for row in written["results"]} == {"tiny"}
    assert any(note.startswith("not measured: the weights of sdxl") for note in written["machine"]["notes"])


def test_rows_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before a run was stopped is kept, and said not to be all."""
    whole = Rounds._run

    def stopped(rounds: Rounds, length: int) -> None:
        if length == 3:
            raise KeyboardInterrupt
        whole(rounds, length)

    monkeypatch.setattr(Rounds, "_run", stopped)
    given = ["bench", "--arch", "tiny", "--methods", "plain,default", "--repeats", "1", "--steps", "2,3", "--quiet"]
    assert main([*given, "--json", str(tmp_path / "b.json")]) == 130
    written = json.loads((tmp_path / "b.json").read_text())
    assert {(row["kind"], row["steps"]) for row in written["results"] if row["method"] == "plain"} == {
        ("step", 1),
        ("run", 2),
    }
    assert any(note.endswith("stopped before its runs of 3 steps ended") for note in written["machine"]["notes"])
    monkeypatch.undo()
    assert main([*given, "--json", str(tmp_path / "b.json")]) == 0
    written = json.loads((tmp_path / "b.json").read_text())
    assert {row["steps"] for row in written["results"] if row["kind"] == "run"} == {2, 3}
    assert not any("stopped" in note for note in written["machine"]["notes"])


def test_what_does_not_fit_into_memory_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 4 * 2**30)
    assert main(["bench", "--arch", "sdxl", "--dtype", "bf16", "--quiet"]) == 2
    assert "the weights of sdxl in bfloat16: 4.8 GB are needed and 4.0 GB are free on cpu" in capsys.readouterr().err


def test_layouts_are_the_published_ones() -> None:
    """By their numbers of parameters, of self-attention layers, and of those blocks that may be merged."""
    import diffusers

    for name, parameters, layers, merged in (
        ("sd15", 859520964, 16, 16),
        ("sd21", 865910724, 16, 16),
        ("sdxl", 2567463684, 70, 70),
        ("pixart", 611349152, 28, 14),
        ("animatediff", 859520964 + 417137600, 16 + 20, 16),
    ):
        with torch.device("meta"):
            model = getattr(diffusers, ARCHITECTURES[name].model)(**ARCHITECTURES[name].config)
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert sum(n.endswith("attn1") for n, _ in model.named_modules()) == layers
        assert len(mergeable(model)) == merged


def test_sdxl_is_given_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pooled text and sizes, on a small model of its layout; a model is one line in the table."""
    small = {"block_out_channels": (16, 32), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    small |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2)}
    small |= {"attention_head_dim": (2, 4), "cross_attention_dim": 8, "norm_num_groups": 8, "sample_size": 16}
    small |= {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 8 + 6 * 4}
    mini = Architecture({**ARCHITECTURES["sdxl"].config, **small}, size=128, settings={"min_tokens": 0})
    monkeypatch.setitem(ARCHITECTURES, "mini", mini)
    host = Host("mini", mini, build("mini", torch.bfloat16, torch.device("cpu"), seed=0), size=128, batch=2)
    methods = [Method("plain", host), Merged("default", host, HALF)]
    *_, found = Rounds(host, methods, repeats=1, steps=[], bound=True).measure(tqdm(disable=True))
    assert {short.tokens for short in found.plans["default"].parts["later"].values()} == {
        64
    }  # its finest attention is at half size
    assert all(short.shape == (4, 32, 32) for short in found.plans["default"].parts["later"].values())
    assert all(torch.isfinite(half).all() for halves in host.seen.values() for half in halves)


NARROW = {
    # their published blocks: fewer and narrower, on 16 x 16 latents
    "pixart": {"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 12, "sample_size": 16}
    | {"cross_attention_dim": 24, "caption_channels": 8},
    "animatediff": {"block_out_channels": (16, 32), "layers_per_block": 1, "num_attention_heads": 2, "sample_size": 16}
    | {"down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "norm_num_groups": 8}
    | {"up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"), "cross_attention_dim": 8}
    | {"motion_num_attention_heads": 2},
}
FRAMES = 3


@pytest.fixture(params=["pixart", "animatediff"])
def other(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model that is no U-Net of Stable Diffusion's, under its own name."""
    name: str = request.param
    known = ARCHITECTURES[name]
    small = replace(known, config={**known.config, **NARROW[name]}, size=128, settings={"min_tokens": 0})
    monkeypatch.setitem(ARCHITECTURES, name, replace(small, frames=small.frames and FRAMES))
    return name


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_other_families_are_merged_as_in_their_pipelines(
    other: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latent's shape comes out; of PixArt the middle half of the blocks is merged; frames are images."""
    model = build(other, torch.float32, torch.device("cpu"), seed=0)
    host = Host(other, ARCHITECTURES[other], model, size=128, batch=batch)
    ours = Merged("default", host, HALF)
    inputs = host.inputs(host.noise * SIGMA, SIGMA)
    plain, _ = record(Method("plain", host), inputs, SIGMA, 0)
    maps: list[Tensor] = []
    monkeypatch.setattr(MergeSession, "observe", lambda self, *halves: maps.extend(halves))
    ours.begin("refresh", SIGMA)
    seen, out = record(ours, inputs, SIGMA, 0)
    shape = {"pixart": (batch, 4, 16, 16), "animatediff": (batch, 4, FRAMES, 16, 16)}[other]
    assert host.noise.shape == shape
    assert out.shape == inputs[0].shape == (2 * batch, *shape[1:])
    assert out.isfinite().all()
    assert host.advance(host.noise, out, SIGMA, 1.0).shape == shape
    plan = plan_of(seen, plain)
    finest = ("down_blocks.0.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1")
    blocks = {
        "pixart": {f"transformer_blocks.{number}" for number in (1, 2)},
        "animatediff": {f"{name}.transformer_blocks.0" for name in finest},
    }
    assert set(plan) == {f"{block}.attn1" for block in blocks[other]}
    images = batch * FRAMES if other == "animatediff" else batch
    assert {(short.shape[0], short.shape[1] / short.tokens) for short in plan.values()} == {(2 * images, 0.5)}
    difference = (out.chunk(2)[1] - out.chunk(2)[0]).abs()[-1].float()
    importance = cfg_magnitude(*maps)
    assert importance.shape == (images, 16, 16)
    torch.testing.assert_close(importance[-1], (difference if other == "pixart" else difference[:, -1]).mean(0))


def test_other_families_are_measured(other: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every kind of row, without the packages that know Stable Diffusion's U-Nets only."""
    pytest.importorskip("tomesd")
    pytest.importorskip("ca_tome")
    arguments = ["--methods", "plain,bound,tomesd,ca-tome,default", "--repeats", "1", "--steps", "2", "--quiet"]
    assert main(["bench", "--arch", other, *arguments, "--json", str(tmp_path / "bench.json")]) == 0
    data = json.loads((tmp_path / "bench.json").read_text())
    phases = {f"default/{phase}" for phase in ("early refresh", "early reuse", "refresh", "reuse")}
    found = {(row["kind"], row["method"]): row for row in data["results"]}
    limits = {"zero_overhead/early", "zero_overhead/later"}
    assert {method for kind, method in found if kind == "step"} == {"plain", "bound", *limits, *phases}
    assert {method for kind, method in found if kind == "run"} == {"plain", "bound", "zero_overhead", "default"}
    for row in found.values():
        assert row.keys() >= KEYS
        assert row["seconds"] > 0
        assert row["frames"] == ARCHITECTURES[other].frames
    assert found["step", "default/reuse"]["merged_fraction"] == 0.5
    assert found["step", "default/early reuse"]["merged_fraction"] == 0.75
    assert found["step", "default/reuse"]["launches_per_layer"]["matching"] == 0
    notes = " ".join(data["machine"]["notes"])
    for package in ("tomesd", "ca-tome"):
        assert f"{package} does not run on {other}: TypeError: it is made for UNet2DConditionModel" in notes
    assert (f"batch 1 of {FRAMES} frames" in capsys.readouterr().out) == (other == "animatediff")


def test_noise_levels_are_those_that_a_family_was_trained_on() -> None:
    from diffusers import DDIMScheduler

    model = nn.Linear(1, 1)
    model.config = SimpleNamespace(in_channels=4, out_channels=4)  # type: ignore[assignment]
    for name, first, last, schedule in (
        ("sd15", 0.00085, 0.012, "scaled_linear"),
        ("animatediff", 0.00085, 0.012, "linear"),
        ("pixart", 0.0001, 0.02, "linear"),
    ):
        host = Host(name, replace(ARCHITECTURES[name], conditioning=lambda *_: {}), model, size=64, batch=1)
        scheduler = DDIMScheduler(beta_start=first, beta_end=last, beta_schedule=schedule)
        least, most = (float(scheduler.alphas_cumprod[i]) for i in (-1, 0))
        assert host.sigmas(20)[0] == pytest.approx((1 / least - 1) ** 0.5, rel=1e-3)
        assert host.sigmas(20)[-1] == pytest.approx((1 / most - 1) ** 0.5, rel=1e-3)


def test_a_clip_is_as_long_as_it_is_said_to_be(other: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    frames = ["--frames", "5"] if other == "animatediff" else []
    given = Settings.of(parser.parse_args(["--arch", other, "--methods", "plain", *frames]))
    assert given.architecture(other).frames == (5 if other == "animatediff" else None)


@pytest.mark.parametrize(
    ("arch", "methods", "noted"),
    [
        ("tiny", "ca_tome", "ca_tome"),
        ("tiny", "ca_tome:stride=4,default", "ca_tome:stride=4"),
        ("tiny", "ca_tome:threshold=0.7", None),
        ("tiny", "default", None),
        ("embedded", "ca_tome", None),
    ],
)
def test_our_preset_is_not_taken_for_the_package(arch: str, methods: str, noted: str | None) -> None:
    """Where it runs without what it is named for."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    notes = Settings.of(parser.parse_args(["--arch", arch, "--methods", methods])).notes_on(arch)
    found = [note.partition(" is our preset")[0] for note in notes if "the package is ca-tome" in note]
    assert found == ([noted] if noted else [])


@pytest.mark.parametrize("single", [True, False])
def test_a_checkpoint_is_loaded(host: Host, inputs: tuple[Tensor, Tensor], single: bool, tmp_path: Path) -> None:
    host.model.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors" if single else tmp_path
    model = build("tiny", torch.float32, torch.device("cpu"), seed=1, checkpoint=path)
    with torch.no_grad():
        assert torch.equal(Host("tiny", ARCHITECTURES["tiny"], model, size=128, batch=1)(inputs), host(inputs))


def test_a_checkpoint_that_is_none_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "no.safetensors").write_bytes(b"no weights")
    for path in (tmp_path, tmp_path / "no.safetensors"):
        with pytest.raises(ValueError, match="cannot be read as a UNet2DConditionModel") as error:
            build("tiny", torch.float32, torch.device("cpu"), seed=0, checkpoint=path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/opt/v/bin/tome-sampler bench --arch sd15 --quick", "tome-sampler bench --arch sd15 --quick"),
        ("/opt/tome_sampler/__main__.py bench --seed 1", "python -m tome_sampler bench --seed 1"),
        ("tome-sampler bench --json /home/me/b.json --seed 1", "tome-sampler bench --json FILE --seed 1"),
        ("tome-sampler bench --plot=/home/me/b.png --mark /home/me", "tome-sampler bench --plot FILE --mark FILE"),
        ("tome-sampler bench --checkpoint /home/me/w.ckpt", "tome-sampler bench --checkpoint PATH"),
    ],
)
def test_the_command_is_kept_without_paths(given: str, shown: str) -> None:
    assert report.command(given.split()) == shown


def test_figures_say_which_command_made_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/me/bin/tome-sampler", "bench", "--methods", "default:ratio=0.7"])
    assert report.machine(torch.device("cpu"))["command"] == "tome-sampler bench --methods default:ratio=0.7"


_ROW = {"arch": "tiny", "batch": 1, "dtype": "fp32", "kind": "step", "steps": 1, "share_of_bound": None, "speedup": 1.0}


def test_curves_are_of_whole_runs_where_there_are_any(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pyplot = report.plotter()
    rows = [
        {**_ROW, "method": method, "size": size, "kind": kind, "steps": 20 if kind == "run" else 1}
        for method in ("plain", "default")
        for size in (512, 768)
        for kind in ("step", "run")
    ]
    for given, labels in ((rows, ["plain, run of 20", "default, run of 20"]), (rows[::2], ["plain", "default"])):
        figures: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pyplot, "close", figures.append)
            report.plot(pyplot, given, tmp_path / "bench.png")
        assert [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()] == labels
    pyplot.close("all")


def test_what_was_measured_is_printed_and_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same table, of the methods that are named, without measuring anything."""
    pytest.importorskip("matplotlib")
    json_file, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    measured = ["bench", "--arch", "tiny", "--quiet", "--quick", "--methods", "plain,bound,default", "--json"]
    assert main([*measured, str(json_file)]) == 0
    table = capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tome_sampler.bench.measure.measure", None)
        assert main(["bench", "--read", str(json_file)]) == 0
        assert capsys.readouterr().out == table
        again = ["bench", "--read", f"{json_file},{json_file}", "--methods", "bound,plain", "--plot", str(picture)]
        assert main(again) == 0
    found = capsys.readouterr().out
    rows = [line.split(" | ")[0] for line in found.splitlines() if line.startswith("| ")]
    assert rows == ["| method", "| bound", "| plain"] * 2
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "it cannot be read: No such file or directory"),
        ("no", "it cannot be read: it is not JSON"),
        ("[]", "it must be a file that tome-sampler bench --json has written"),
        ('{"machine": {"load": [1, 2]}, "results": [{"method": "plain"}]}', "it must be a file that"),
    ],
)
def test_a_file_that_is_none_of_ours_is_named(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.json"
    if content is not None:
        path.write_text(content)
    assert main(["bench", "--read", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"read is '{path}'; {message}" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("sizes", "count"), [((512,), 4), ((512,), 50), ((512, 768), 50)])
def test_labels_of_a_picture_do_not_overlap(sizes: tuple[int, ...], count: int, tmp_path: Path) -> None:
    """However many there are; what has no share of a bound is drawn as all else."""
    pytest.importorskip("matplotlib")
    pyplot = report.plotter()
    rows = [{**_ROW, "method": f"m{i}", "size": size} for i in range(count) for size in sizes]
    figures: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyplot, "close", figures.append)
        report.plot(pyplot, rows, tmp_path / "bench.PNG")
    figures[0].canvas.draw()
    axes = figures[0].axes[0]
    texts = axes.get_yticklabels() if len(sizes) == 1 else axes.get_legend().get_texts()
    boxes = sorted((text.get_window_extent() for text in texts), key=lambda box: box.y0)
    assert len(boxes) == count
    assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(boxes))
    assert boxes[0].y0 >= 0
    assert boxes[-1].y1 <= figures[0].bbox.height
    pyplot.close("all")
    assert [path.name for path in tmp_path.iterdir()] == ["bench.PNG"]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    assert stop.value.code == 0
    assert "tome-sampler bench --arch sd15 --size 512" in capsys.readouterr().out


def test_the_embedded_model_is_measured_too() -> None:
    """Its input has places beside the latent, which a run's noise has not."""
    model = build("embedded", torch.float32, torch.device("cpu"), seed=0)
    host = Host("embedded", ARCHITECTURES["embedded"], model, size=32, batch=1)
    out = host(host.inputs(host.noise, 5.0))
    assert out.shape == (2, *host.noise.shape[1:])
    assert host.noise.shape[1] == model.config.out_channels  # type: ignore[union-attr]
    assert torch.isfinite(host.advance(host.noise, out, 5.0, 4.0)).all()
