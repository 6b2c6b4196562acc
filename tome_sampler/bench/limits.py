"""How fast it could be: merged layers that return at once, and merged layers whose matching and merging are free."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from tome_sampler.attention import KeyBias, proportional_attention
from tome_sampler.bench.methods import LENGTHS, PLAIN, Inputs, Merged, Method, part_of
from tome_sampler.hosts.feedforward import HalvedFeedForward
from tome_sampler.session import MergeSession

_PARTS = ("attn1", "attn2", "ff")


@dataclass(frozen=True, eq=False)
class Short:
    """A module that gets (rows m channels), `shape`, where it gets `tokens` tokens without merging. bias: what its
    keys' logits gain, if they do. block: the transformer block that it is, or is a part of. outer: no module around
    it gets a short sequence too."""

    shape: torch.Size
    tokens: int
    bias: KeyBias | None
    block: str
    outer: bool


Plan = dict[str, Short]
"""What merging makes of a call: each module that works on a short sequence."""


@dataclass(frozen=True)
class Plans:
    """What a method makes of its calls. parts: in each part of a run. runs: in each step of whole runs, by their
    length, where it depends on the picture."""

    parts: dict[str, Plan] = field(default_factory=dict)
    runs: dict[int, list[Plan]] = field(default_factory=dict)

    def composed(self, phases: Sequence[str]) -> list[Plan]:
        """Of each step of a run of these phases, as its part says."""
        return [self.parts.get(part_of(phase), {}) for phase in phases]

    def in_run(self, phases: Sequence[str]) -> list[Plan]:
        """Of each step of a run that is measured as a whole."""
        return self.runs.get(len(phases)) or self.composed(phases)


Seen = dict[str, tuple[torch.Size, KeyBias | None]]
"""What each module works on in a call: the shape, and the bias of its keys in force."""


def _candidates(root: nn.Module) -> dict[str, nn.Module]:
    """Transformer blocks and their parts; a block comes before what it holds."""
    found: dict[str, nn.Module] = {}
    for name, module in root.named_modules():
        if isinstance(getattr(module, "attn1", None), nn.Module):
            found[name] = module
            parts = {part: getattr(module, part, None) for part in _PARTS}
            found |= {f"{name}.{part}": m for part, m in parts.items() if isinstance(m, nn.Module)}
    return found


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


@contextmanager
def shapes_seen(root: nn.Module) -> Iterator[Seen]:
    """Within it, what modules work on is noted, after all hooks that are there before: enter it when a method is on."""
    seen: Seen = {}

    def see(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        modes = [m for m in _get_current_function_mode_stack() if isinstance(m, proportional_attention)]
        seen[name] = _first(args, kwargs).shape, modes[-1].bias if modes else None

    with ExitStack() as stack:
        for name, module in _candidates(root).items():
            stack.enter_context(module.register_forward_pre_hook(partial(see, name), with_kwargs=True))
        yield seen


def plan_of(seen: Seen, plain: Seen) -> Plan:
    """What is shorter than in a plain call."""
    plan: Plan = {}
    for name, (shape, bias) in seen.items():
        tokens = plain[name][0][1]
        if shape[1] < tokens:
            around, _, last = name.rpartition(".")
            block = around if last in _PARTS else name
            plan[name] = Short(shape, tokens, bias, block, outer=around not in plan)
    return plan


@contextmanager
def _forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Within it, `forward` stands in for the module's own."""
    own = vars(module)
    before = own.get("forward")
    own["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before


class Limit(Method):
    """A method that works from the plans of another one, `of`. It has a phase for each part of the run, if it does
    not the same in all."""

    def __init__(self, name: str, of: Method, plans: Plans) -> None:
        super().__init__(name, of.host)
        self.of, self._plans = of, plans
        self._parts = tuple(plans.parts)
        alike = len({self.work(plan) for plan in plans.parts.values()}) == 1
        self.phases = ("",) if alike else self._parts
        self._coming: Iterator[Plan] = iter(())

    def begin(self, phase: str, sigma: float) -> None:
        self._coming = itertools.repeat(self._plans.parts[phase or self._parts[0]])

    def restart(self, sigmas: list[float]) -> None:
        self._coming = iter(self._plans.in_run(self.of.phases_in(sigmas)))

    def phases_in(self, sigmas: list[float]) -> list[str]:
        parts = [part_of(phase) for phase in self.of.phases_in(sigmas)]
        return [part if part in (PLAIN, *self.phases) else "" for part in parts]

    def place(self, phase: str) -> int:
        return self.of.place(phase or self._parts[0])

    @contextmanager
    def on(self) -> Iterator[None]:
        plan = next(self._coming)
        with ExitStack() as stack:
            for name, short in plan.items():
                module = self.host.model.get_submodule(name)
                stack.enter_context(_forward(module, self.stand_in(module, short)))
            stack.enter_context(self.besides(plan))
            yield

    def besides(self, plan: Plan) -> AbstractContextManager[None]:
        """What the method does besides merging, and its limit does too."""
        return nullcontext()

    def stand_in(self, module: nn.Module, short: Short) -> Any:
        """What the module does instead."""
        raise NotImplementedError

    def work(self, plan: Plan) -> Hashable:
        """What it does by a plan; it does the same by another one of the same work."""
        raise NotImplementedError

    def work_in_runs(self, lengths: Sequence[int]) -> Hashable:
        """What it does in each step, put together and in whole runs: two limits with the same one are one."""
        runs = [self._plans.composed(self.of.phases_in(self.host.sigmas(length))) for length in LENGTHS]
        runs += [self._plans.in_run(self.of.phases_in(self.host.sigmas(length))) for length in lengths]
        return tuple(self.work(plan) for plan in itertools.chain(*runs))


class Bound(Limit):
    """The merged layers return at once: no merging of these layers can be faster."""

    def stand_in(self, module: nn.Module, short: Short) -> Any:
        return (lambda *args, **kwargs: _first(args, kwargs)) if short.outer else module.forward

    def work(self, plan: Plan) -> Hashable:
        return tuple(name for name, short in plan.items() if short.outer)


class ZeroOverhead(Limit):
    """The merged layers are given ready-made short sequences, and a ready-made long result is taken for theirs. With
    merging of ours the feed-forward is halved here, too."""

    def __init__(self, name: str, of: Method, plans: Plans) -> None:
        super().__init__(name, of, plans)
        self._ready: dict[tuple[int, ...], Tensor] = {}

    def _sequence(self, rows: int, tokens: int, channels: int) -> Tensor:
        shape = (rows, tokens, channels)
        if shape not in self._ready:
            generator = torch.Generator().manual_seed(0)
            self._ready[shape] = torch.randn(shape, generator=generator).to(self.host.device, self.host.dtype)
        return self._ready[shape]

    def stand_in(self, module: nn.Module, short: Short) -> Any:
        forward = module.forward
        given = self._sequence(*short.shape)
        result = self._sequence(short.shape[0], short.tokens, short.shape[2])
        heads = getattr(module, "heads", None)

        def ready(*args: Any, **kwargs: Any) -> Any:
            x, mode = _first(args, kwargs), _mode(short.bias, heads)
            with mode:
                if not short.outer:  # what is around it has been given a short sequence already
                    return forward(*args, **kwargs)
                forward(
                    *(given if a is x else a for a in args), **{k: given if v is x else v for k, v in kwargs.items()}
                )
            return result

        return ready

    @contextmanager
    def besides(self, plan: Plan) -> Iterator[None]:
        if not plan or not isinstance(self.of, Merged):
            yield
            return
        session = MergeSession(self.of.config)
        session.largest = max(short.shape[0] * short.tokens * short.shape[2] for short in plan.values())
        merging = {self.host.model.get_submodule(name) for name, short in plan.items() if short.outer}
        halved = HalvedFeedForward(self.host.model, session, merging)
        halved.follow()
        try:
            yield
        finally:
            halved.remove()

    def work(self, plan: Plan) -> Hashable:
        lengths = ((name, s.shape, s.bias is not None, s.outer) for name, s in plan.items())
        return isinstance(self.of, Merged), *lengths

    def release(self) -> None:
        self._ready.clear()


def _mode(bias: KeyBias | None, heads: Any) -> AbstractContextManager[Any]:
    if bias is None:
        return nullcontext()
    return proportional_attention(bias, heads=heads if isinstance(heads, int) else None)


def record(method: Method, inputs: Inputs, sigma: float, step: int) -> tuple[Seen, Tensor]:
    """What each module works on in one call of a method, and what the call gives; not timed."""
    with method.on(), shapes_seen(method.host.model) as seen:
        out = method.call(inputs, sigma, step)
    return seen, out
