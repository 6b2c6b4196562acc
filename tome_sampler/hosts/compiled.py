"""Merging inside ``torch.compile``: deciding, matching and merging are operators that the compiler does not look into.

New pairs, new importance and another noise level then need no new graph, and nothing of ours breaks one. That takes
lengths that are known beforehand, so it holds for a fixed ratio: one graph for a whole run, or two if more is merged in
its early part. With a threshold, or a start or an end, merging works too, but each merged layer breaks the graph.

A CUDA graph replays kernels and asks nobody: a decision inside it would be the first step's for ever. So the operators
are marked as what the compiler runs between its CUDA graphs (``mode="reduce-overhead"``); where it knows no such mark
they refuse to be captured.
"""

from __future__ import annotations

import inspect
import itertools
import operator
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tome_sampler.attention import KeyBias, has_own_attention, own_attention
from tome_sampler.session import Layer, MergeSession, ModelCall

HAS_OPERATORS = hasattr(torch.library, "custom_op")
"""Whether this torch, 2.4 or newer, takes operators of ours into its graphs."""
is_compiling: Callable[[], bool] = torch.compiler.is_compiling if HAS_OPERATORS else lambda: False
"""Whether the compiler is looking at the code that asks."""


def run_uncompiled(root: nn.Module) -> None:
    """Let a model run as it is written, inside ``torch.compile`` too, until :func:`run_as_before`: for a torch whose
    compiler cannot take our operators and would take a step's decisions for constants."""
    own, forward = vars(root), root.forward
    if hasattr(own.get("forward"), _BEFORE):
        return

    def uncompiled(*args: Any, **kwargs: Any) -> Any:
        compiler: Any = sys.modules.get("torch._dynamo")  # slow to import, and there if anything was compiled
        return (forward if compiler is None else compiler.disable(forward))(*args, **kwargs)

    setattr(uncompiled, _BEFORE, own.get("forward"))
    own["forward"] = uncompiled


def run_as_before(root: nn.Module) -> None:
    """Undo :func:`run_uncompiled`, if nobody else has put another forward in its place since."""
    own = vars(root)
    if hasattr(own.get("forward"), _BEFORE):
        before = getattr(own.pop("forward"), _BEFORE)
        if before is not None:
            own["forward"] = before


def is_captured() -> bool:
    """Whether what is done now is written down for a CUDA graph, to be done again and again."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


_BEFORE = "before_tome_sampler"
_numbers = itertools.count()
_at_work: weakref.WeakValueDictionary[int, Compiled] = weakref.WeakValueDictionary()


@dataclass
class _Opened:
    """A layer that is running on merged tokens. given: what it was given before they were merged. row: (b * n) the
    merged row of each token. sizes: log(size) of its keys, or None where they count once each."""

    given: Tensor
    merged: Tensor
    row: Tensor
    sizes: Tensor | None

    def unmerged(self, y: Tensor) -> Tensor:
        return functional.embedding(self.row, y.reshape(-1, y.shape[-1])).view(*self.given.shape[:2], -1)


class Compiled:
    """One session's hooks on one module tree, as the compiler sees them. All but the operators' bodies is traced.

    Args:
        describe: says of a call of `root` what it is.
        layers: by their number.
        observe: is given `root` and what it returned.
        begun: a method that is called when a call has begun; what it is a method of is not kept alive.
    """

    def __init__(
        self,
        root: nn.Module,
        session: MergeSession,
        describe: Callable[..., ModelCall | None],
        layers: list[Layer],
        observe: Callable[[nn.Module, Any], None] | None,
        begun: Callable[[], None],
    ) -> None:
        self.number = next(_numbers)
        self.session, self.layers, self._observe, self._begun = session, layers, observe, weakref.WeakMethod(begun)
        self._root, self._describe = weakref.ref(root), describe
        self._size: tuple[int, int] | None = None
        self._levels: list[float] = []
        self._open: list[_Opened | None] = []
        self.own_call: ModelCall | None = None  # that a compiled graph has told of
        _at_work[self.number] = self

    # -- traced

    def begin(self, x: Tensor, time: Any) -> Tensor:
        """The root is called with x (rows c h w), at a time; returns what takes x's place."""
        # index: a graph for each size, as merged lengths follow from it, also where the compiler would have one for all
        self._size, self._levels = (operator.index(x.shape[-2]), operator.index(x.shape[-1])), []
        self._open = []  # of a call that failed
        return _begin(x, time if isinstance(time, Tensor) else torch.tensor(0.0 if time is None else time), self.number)

    def observe(self, output: Any) -> Any:
        """What the root returns, seen by the observer."""
        if isinstance(output, Tensor):
            return _seen(output, self.number)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (_seen(output[0], self.number), *output[1:])
        sample = getattr(output, "sample", None)
        if isinstance(sample, Tensor):
            output.sample = _seen(sample, self.number)
        return output

    def add(self, layer: Layer) -> int:
        """A layer's number."""
        self.layers.append(layer)
        return len(self.layers) - 1

    def skip(self) -> None:
        """A layer runs on all its tokens."""
        self._open.append(None)

    def merge(self, number: int, x: Tensor, metric: Tensor | None, attention: nn.Module | None) -> Tensor | None:
        """Merged tokens for a layer that is given x (b n c), or None. Each call is followed by one of :meth:`close`.

        `attention` is the layer that will attend to them, if any: its keys must be counted, and padding not be seen.
        """
        config = self.session.config
        counted = config.proportional or config.threshold is not None
        if attention is not None and counted and not has_own_attention(attention):
            self.uncounted(attention)
            self._open.append(None)
            return None
        opened = self._opened(number, x, metric)
        self._open.append(opened)
        return None if opened is None else opened.merged

    def attend(self, number: int, module: nn.Module, x: Tensor, metric: Tensor | None) -> Tensor | None:
        """As :meth:`merge`, for an attention layer: one whose keys are counted attends in :meth:`close`."""
        merged, opened = self.merge(number, x, metric, module), self._open[-1]
        return merged if merged is None or opened is None or opened.sizes is None else merged[:, :1]

    def attend_in_block(self, x: Tensor) -> Tensor | None:
        """The attention of a block that runs on merged tokens is given x."""
        block = self._open[-1]
        if block is None or block.sizes is None:
            self._open.append(None)
            return None
        self._open.append(_Opened(x, x, block.row, block.sizes))
        return x[:, :1]

    def close(self, module: nn.Module, output: Tensor, part: str) -> Tensor:
        """A layer's output for all its tokens; for those of its block, if it is the attention of a whole "block"."""
        opened = self._open.pop()
        if opened is None:
            return output
        if part in ("attn1", "block") and opened.sizes is not None:
            own = own_attention(module, opened.merged, KeyBias(opened.sizes))
            assert own is not None  # merge has asked
            output = own
        return output if part == "block" else opened.unmerged(output)

    def close_block(self, output: Tensor) -> Tensor:
        """A block's output for all its tokens."""
        opened = self._open.pop()
        return output if opened is None else opened.given + opened.unmerged(output - opened.merged)

    def _opened(self, number: int, x: Tensor, metric: Tensor | None) -> _Opened | None:
        if self.session.suspended:
            return None
        config, n, channels = self.session.config, operator.index(x.shape[1]), operator.index(x.shape[2])
        if self._size is None:  # the root runs as it is, and has told the session of its call
            too_coarse = _too_coarse(self.number, n)
        else:
            coarseness = self._size[0] * self._size[1] / n
            if coarseness not in self._levels:
                self._levels.append(coarseness)
            too_coarse = sorted(self._levels).index(coarseness) >= config.levels
        if too_coarse or _too_short(self.number, operator.index(number), n, channels, x.dtype, x.device.type):
            return None
        size = self._size or self.session.latent_size
        m = None if size is None else self.session.fixed_length(n, size)
        if m is None:
            found = self.merge_now(number, x, metric)
        else:
            found = _merge(x, x if metric is None else metric, self.number, number, m, self.session.early)
        if found is None:
            return None
        merged, sizes, row = found
        counted = config.proportional or config.threshold is not None
        return _Opened(x, merged, row, sizes if counted else None)

    # -- not traced

    def root_runs_uncompiled(self) -> None:
        """The root is called, and not by a graph: parts of it may be compiled, as blocks are one by one."""
        self._size, self._open = None, []

    def begin_now(self, x: Tensor, time: Tensor) -> None:
        """The root runs. A call that somebody else has told of stands."""
        current = self.session.current
        if not self.session.suspended and (current is None or current is self.own_call):
            root = self._root()
            call = None if root is None else self._describe(root, (x, time), {})
            self.own_call = call
            if call is not None:
                self.session.begin(call)
        begun = self._begun()
        if begun is not None:
            begun()

    def seen_now(self, out: Tensor) -> None:
        """The root has returned this, in a call that nobody else has told of."""
        root, own = self._root(), self.own_call
        if root is not None and self._observe is not None and own is not None and self.session.current is own:
            self._observe(root, out)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def uncounted(self, attention: nn.Module) -> None:
        """A layer's attention is of a kind that :func:`own_attention` cannot stand in for."""
        self.session.note(
            f"{type(attention).__name__} cannot count its keys in a compiled model: its tokens are not merged"
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def unreached(self, name: str) -> None:
        """The root has run and no layer of it: the compiler does not look for hooks that came after its graphs."""
        self.session.note(
            f"nothing of {name} was reached. If it was compiled before merging began, call torch._dynamo.reset(), and "
            "it will be compiled anew with merging in it"
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def merge_now(self, number: int, x: Tensor, metric: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
        """What x (b n c) is merged to (b m c), what its keys' logits gain (b m), and each token's row (b * n)."""
        layer = self.layers[number]
        pairing = self.session.merge(layer, x, metric)
        if pairing is None:
            return None
        with self.session.timed("merging", x.device):
            merged = pairing.merge(x)
        bias = pairing.log_size if self.session.config.proportional else pairing.log_mask
        return merged, bias.values.clone(), pairing.flat_row.clone()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _too_coarse(run: int, n: int) -> bool:
    """Whether layers of n tokens are of a level that is not merged, in a call that has begun."""
    return _at_work[run].session.too_coarse(n)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _too_short(run: int, number: int, n: int, channels: int, dtype: torch.dtype, device: str) -> bool:
    """The size gate, whose answer is part of the graph: lengths and widths are, too."""
    compiled = _at_work[run]
    return compiled.session.too_short(compiled.layers[number], n, channels, dtype, device)


def _merge_op(x: Tensor, metric: Tensor, run: int, number: int, m: int, early: bool) -> tuple[Tensor, Tensor, Tensor]:
    compiled = _at_work.get(run)
    if compiled is None:
        raise RuntimeError("a model that was compiled while tokens were merged runs after that: compile it anew")
    compiled.session.merge_as(early)
    found: tuple[Tensor, Tensor, Tensor] | None = compiled.merge_now(number, x, metric)
    if found is None or found[0].shape[1] != m:
        name = compiled.layers[number].name
        raise RuntimeError(f"{name} cannot be merged in this call, and a compiled model cannot leave it alone")
    return found


def _merge_fake(x: Tensor, metric: Tensor, run: int, number: int, m: int, early: bool) -> tuple[Tensor, Tensor, Tensor]:
    b, n, c = x.shape
    return x.new_empty(b, m, c), x.new_empty(b, m, dtype=torch.float32), x.new_empty(b * n, dtype=torch.int32)


def _begin_op(x: Tensor, time: Tensor, run: int) -> Tensor:
    compiled = _at_work.get(run)
    if compiled is not None and is_captured():
        raise RuntimeError(
            "merging decides in each step, which a CUDA graph cannot: compile without mode='reduce-overhead' and "
            "'max-autotune', or with torch 2.9 or newer, which leaves merging out of its CUDA graphs"
        )
    if compiled is not None:
        compiled.begin_now(x, time)
    return x.clone()


def _begin_fake(x: Tensor, time: Tensor, run: int) -> Tensor:
    return torch.empty_like(x)


def _seen_op(out: Tensor, run: int) -> Tensor:
    compiled = _at_work.get(run)
    if compiled is not None:
        compiled.seen_now(out)
    return out.clone()


def _seen_fake(out: Tensor, run: int) -> Tensor:
    return torch.empty_like(out)


_begin, _merge, _seen = _begin_op, _merge_op, _seen_op
if HAS_OPERATORS:
    _outside: dict[str, Any] = {}
    if "tags" in inspect.signature(torch.library.custom_op).parameters and hasattr(torch.Tag, "cudagraph_unsafe"):
        _outside["tags"] = (torch.Tag.cudagraph_unsafe,)  # a lone tag is taken from torch 2.13 on

    def _operator(name: str, schema: str, function: Any, fake: Any) -> Any:
        # torch 2.4 cannot read a schema off annotations that are strings
        operator = torch.library.custom_op(
            f"tome_sampler::{name}", function, mutates_args=(), schema=schema, **_outside
        )
        operator.register_fake(fake)
        return operator

    _begin = _operator("begin", "(Tensor x, Tensor time, SymInt run) -> Tensor", _begin_op, _begin_fake)
    _merge = _operator(
        "merge",
        "(Tensor x, Tensor metric, SymInt run, SymInt number, SymInt m, bool early) -> (Tensor, Tensor, Tensor)",
        _merge_op,
        _merge_fake,
    )
    _seen = _operator("seen", "(Tensor out, SymInt run) -> Tensor", _seen_op, _seen_fake)
