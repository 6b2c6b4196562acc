"""Module trees with ``attn1`` layers (ldm, sgm, diffusers): forward hooks, nothing replaced, nothing copied."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from tome_sampler.attention import KeyBias, has_own_attention, own_attention, proportional_attention
from tome_sampler.config import MergeConfig
from tome_sampler.hosts.compiled import (
    HAS_OPERATORS,
    Compiled,
    is_captured,
    is_compiling,
    run_as_before,
    run_uncompiled,
)
from tome_sampler.hosts.families import mergeable, require_known
from tome_sampler.hosts.feedforward import HalvedFeedForward
from tome_sampler.hosts.pipelines import PipelineCalls, is_pipeline, writes_reference
from tome_sampler.pairing import Pairing
from tome_sampler.session import Layer, MergeSession, ModelCall

_TIMESTEPS = 1000


@cache
def _sigmas() -> list[float]:
    """The noise level of each timestep, rising, where betas are as of Stable Diffusion ("scaled linear")."""
    kept = 1.0
    sigmas = []
    for step in range(_TIMESTEPS):
        kept *= 1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * step / (_TIMESTEPS - 1)) ** 2
        sigmas.append(math.sqrt((1 - kept) / kept))
    return sigmas


# The sessions at work on each root module, innermost last. Weak: it keeps no model alive, and no mark is left on one.
_attached: weakref.WeakKeyDictionary[nn.Module, list[_Attachment]] = weakref.WeakKeyDictionary()


Describe = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], ModelCall | None]
"""What a call of the root module, with these arguments, is, or None where that is unknown."""
Observe = Callable[[nn.Module, Any], None]
"""Is given the root module and what it returned."""


@dataclass
class _Open:
    """A layer that is running on merged tokens, and what it was given before they were."""

    layer: Layer
    pairing: Pairing
    merged: Tensor
    given: Tensor
    bias: KeyBias | None = None  # what its keys' logits gain
    mode: proportional_attention | None = None
    block: _Open | None = None  # that merged them and will unmerge
    spoiled: bool = False  # something in it has attended to padding


@dataclass(eq=False)
class _Hooked:
    """A part of a block and its hooks, which are off while it is left alone. tokens: how many it had then."""

    layer: Layer
    module: nn.Module
    before: Any
    after: Any
    tokens: int = 0
    stack: ExitStack = field(default_factory=ExitStack)

    def on(self) -> None:
        _hook(self.stack, self.module, self.before, self.after)


def _hook(stack: ExitStack, module: nn.Module, before: Any, after: Any) -> None:
    """Put hooks on a module until the stack is closed."""
    # RemovableHandle is a context manager. always_call: an exception inside must not leave a state behind.
    stack.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
    stack.enter_context(module.register_forward_hook(after, with_kwargs=True, always_call=True))


class _Attachment:
    """The hooks of one session on one module tree."""

    def __init__(
        self,
        root: nn.Module,
        session: MergeSession,
        describe: Describe,
        failed: Callable[[Exception], None] | None,
        observe: Observe | None,
    ) -> None:
        self.session, self._describe, self._failed, self._observe = session, describe, failed, observe
        self.suspends: list[MergeSession] = []  # those that wait until this one is gone
        self._stack = ExitStack()
        self._open: dict[nn.Module, _Open] = {}
        self._open_blocks: dict[nn.Module, _Open] = {}
        self._unreached: set[nn.Module] = set()  # attention that calls nothing which takes the sizes of the keys
        self._blind: set[nn.Module] = set()  # such that cannot be stood in for either, so that it sees padding
        self._block_input: dict[nn.Module, Tensor] = {}
        self._call: AbstractContextManager[None] | None = None
        self._compiled = Compiled(root, session, describe, [], observe, self._wake)
        self._reached = False  # whether a layer has run
        self._parts: list[_Hooked] = []
        self._idle: set[int] = set()  # those of them to ask the session about: this call has left them alone, again
        self._resting: list[_Hooked] = []  # those whose hooks are off
        self._apart = False  # whether whole blocks cannot be merged, see _runs_apart
        blocks = mergeable(root)
        merging = [block._modules.get("ff") for _, block in blocks if "ff" in session.config.all_modules]
        self._feed_forward = HalvedFeedForward(root, session, merging)
        try:
            _hook(self._stack, root, self._begin, self._end)
            for number, (name, block) in enumerate(blocks):
                self._hook_block(number, name, block)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take every hook off again. Nothing keeps the attachment alive then: compiled graphs look for it."""
        self._stack.close()
        self._abandon()
        self._feed_forward.remove()
        self._parts.clear()
        self._resting.clear()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy would merge by the original's session, and nothing would take its hooks off."""
        raise TypeError(
            "a model cannot be copied or pickled while its tokens are merged: remove_patch it first (a state_dict can "
            "be saved at any time)"
        )

    def _abandon(self) -> None:
        """Close what an interrupt left open: torch runs `always_call` hooks after an Exception, not after others."""
        for opened in self._open.values():
            if opened.mode is not None:
                opened.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._open.clear()
        self._open_blocks.clear()
        self._block_input.clear()
        self._idle.clear()
        if self._call is not None:
            call, self._call = self._call, None
            call.__exit__(None, None, None)

    def _rest(self) -> None:
        """Take off the hooks of layers that are left alone: even to be asked costs a small model a percent."""
        for hooked in (self._parts[place] for place in self._idle):
            hooked.tokens = self.session.left_alone(hooked.layer)
            if hooked.tokens:
                hooked.stack.close()
                self._resting.append(hooked)
        self._idle.clear()

    def _wake(self) -> None:
        """Put them on again, if another run or size has begun. A compiled model sees that in its next call."""
        if self._resting and not self.session.leaves_alone(self._resting[0].layer, self._resting[0].tokens):
            for hooked in self._resting:
                hooked.on()
            self._resting.clear()

    def _hook_block(self, number: int, name: str, block: nn.Module) -> None:
        config = self.session.config
        if config.metric == "block":

            def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = _tokens(args, kwargs)
                if x is not None:
                    self._block_input[module] = x

            def forget(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                self._block_input.pop(module, None)

            _hook(self._stack, block, remember, forget)
        if "block" in config.all_modules and not self._runs_apart(name, block):
            layer = Layer(name or "block", number)
            _hook(self._stack, block, self._before_block(layer), self._after_block)
            for attention in (block.attn1, getattr(block, "attn2", None)):
                if isinstance(attention, nn.Module):
                    _hook(self._stack, attention, self._before_attention_of(block), self._after("block"))
        for part in sorted(config.all_modules - {"block"}):
            module = getattr(block, part, None)
            if isinstance(module, nn.Module):
                layer = Layer(f"{name}.{part}" if name else part, number)
                before, after = self._before(layer, block, part, place=len(self._parts)), self._after(part)
                if part == "ff":
                    before, after = self._feed_forward.around(module, before, after)
                hooked = _Hooked(layer, module, before, after)
                hooked.on()
                self._stack.enter_context(hooked.stack)
                self._idle.add(len(self._parts))
                self._parts.append(hooked)
        self._rest()  # of what a session knows that has been at work before

    def _runs_apart(self, name: str, block: nn.Module) -> bool:
        """Whether a block has a graph of its own and is merged whole in one part of the run alone. The compiler then
        leaves out of the graph what it has once seen do nothing, and what is around it and what is in it disagree."""
        config = self.session.config
        alike = config.early is None or ("block" in config.modules) == ("block" in config.early.modules)
        compiled = getattr(block, "_compiled_call_impl", None) is not None or name.endswith("_orig_mod")
        self._apart |= compiled and not alike
        return compiled and not alike

    def _in_chunks(self, block: nn.Module, of_rows: bool = True) -> bool:
        """Whether a block calls its feed-forward on one chunk after the other (diffusers' ``set_chunk_feed_forward``):
        a chunk has no pairs of its own, and merged tokens need not divide by its size. of_rows: or of whole rows."""
        if getattr(block, "_chunk_size", None) is None or not (of_rows or block._chunk_dim != 0):
            return False
        if not is_compiling():
            self.session.note("feed-forwards are called in chunks (set_chunk_feed_forward): passed through")
        return True

    def _before(self, layer: Layer, block: nn.Module, part: str, place: int) -> Any:
        number = self._compiled.add(layer)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._reached = True
            if part not in self.session.modules:
                return None
            x = None if part == "ff" and self._in_chunks(block) else _tokens(args, kwargs)
            if x is not None and not is_compiling() and self.session.leaves_alone(layer, x.shape[1]):
                self._idle.add(place)
                return None
            if x is None or (part == "attn1" and not _attends_to_itself(x, args, kwargs)) or _needs_all(kwargs):
                return self._compiled.skip() if is_compiling() else None
            attends = part != "ff" and _attends_to_itself(x, args, kwargs)  # attn2 does in blocks that have no context
            if is_compiling():
                metric = self._block_input.get(block)
                if part == "attn1":
                    merged = self._compiled.attend(number, module, x, metric)
                elif attends:
                    return self._compiled.skip()
                else:
                    merged = self._compiled.merge(number, x, metric, None)
                if merged is not None:
                    self._feed_forward.merged_compiled(x)
                return None if merged is None else _with_tokens(merged, x, args, kwargs)
            opened = None if attends and module in self._blind else self._merge(layer, x, self._block_input.get(block))
            if opened is None:
                return None
            self._feed_forward.follow()
            given = self._attend(module, opened) if attends else opened.merged
            self._open[module] = opened
            return _with_tokens(given, x, args, kwargs)

        return before

    def _before_block(self, layer: Layer) -> Any:
        number = self._compiled.add(layer)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._reached = True
            if "block" not in self.session.modules:
                return None
            masked = isinstance(kwargs.get("attention_mask"), Tensor)  # made for all tokens
            blind = not self._blind.isdisjoint(module.children())
            whole = masked or blind or _needs_all(kwargs) or self._in_chunks(module, of_rows=False)
            x = None if whole else _tokens(args, kwargs)
            if is_compiling():
                if x is None:
                    return self._compiled.skip()
                merged = self._compiled.merge(number, x, None, module.attn1)  # type: ignore[arg-type]
                if merged is not None:
                    self._feed_forward.merged_compiled(x, block=True)
                return None if merged is None else _with_tokens(merged.clone(), x, args, kwargs)
            opened = None if x is None else self._merge(layer, x, None)
            if x is None or opened is None:
                return None
            self._open_blocks[module] = opened
            self._feed_forward.enter_block()
            # a copy: some blocks (ComfyUI's kind) add to what they are given in place
            return _with_tokens(opened.merged.clone(), x, args, kwargs)

        return before

    def _before_attention_of(self, block: nn.Module) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if "block" not in self.session.modules:
                return None
            x = _tokens(args, kwargs)
            if is_compiling():
                if x is None or not _attends_to_itself(x, args, kwargs) or not has_own_attention(module):
                    return self._compiled.skip()
                given = self._compiled.attend_in_block(x)
                return None if given is None else _with_tokens(given, x, args, kwargs)
            if block not in self._open_blocks or x is None or not _attends_to_itself(x, args, kwargs):
                return None
            around = self._open_blocks[block]
            self._open[module] = opened = _Open(around.layer, around.pairing, x, x, block=around)
            return _with_tokens(self._attend(module, opened), x, args, kwargs)

        return before

    def _merge(self, layer: Layer, x: Tensor, metric: Tensor | None) -> _Open | None:
        pairing = None
        try:
            pairing = self.session.merge(layer, x, metric)
            if pairing is None:
                return None
            with self.session.timed("merging", x.device):
                x = x.contiguous()  # once: a picture that is seen as tokens is read slowly
                return _Open(layer, pairing, pairing.merge(x), x)
        except Exception as error:
            if pairing is not None:
                self.session.take_back(layer, x, pairing)
            self._report(error)
            return None

    def _report(self, error: Exception) -> None:
        """An error of ours, which must not be a host's; without one it is the caller's."""
        if self._failed is None:
            raise error
        self._failed(error)

    def _attend(self, module: nn.Module, opened: _Open) -> Tensor:
        """Make an attention layer that is about to run count its keys; returns what it is given."""
        pairing, proportional = opened.pairing, self.session.config.proportional
        # padding, which evens out different counts, must never be attended to, proportional or not
        if not proportional and not pairing.padded:
            return opened.merged
        opened.bias = pairing.log_size if proportional else pairing.log_mask
        # its own attention is of no use: a single token, to be quick about it
        if module in self._unreached and has_own_attention(module):
            return opened.merged[:, :1]
        heads = getattr(module, "heads", None)
        heads = heads if isinstance(heads, int) else None
        opened.mode = proportional_attention(opened.bias, heads=heads, tokens=opened.merged)
        opened.mode.__enter__()  # type: ignore[no-untyped-call]
        return opened.merged

    def _after_block(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        self._feed_forward.leave_block()
        if is_compiling():
            return self._compiled.close_block(output) if "block" in self.session.modules else None
        if module not in self._open_blocks:
            return None
        opened = self._open_blocks.pop(module)
        if not isinstance(output, Tensor):
            return None
        if opened.spoiled:
            return self._on_all_tokens(module, opened, args, kwargs)
        with self.session.timed("merging", output.device):
            return opened.pairing.unmerge(output - opened.merged).add_(opened.given)

    def _after(self, part: str) -> Any:
        """The hook after a part of a block, or after an attention layer of a whole "block"."""

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if is_compiling():
                return self._compiled.close(module, output, part) if part in self.session.modules else None
            return self._close(module, args, kwargs, output)

        return after

    def _close(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if module not in self._open:
            return None
        opened = self._open.pop(module)
        if opened.mode is not None:
            opened.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        several = isinstance(output, tuple) and output and isinstance(output[0], Tensor)  # with weights, say
        tokens = output[0] if several else output
        if not isinstance(tokens, Tensor):
            return None
        if opened.bias is not None and (opened.mode is None or not opened.mode.used):
            own = own_attention(module, opened.merged, opened.bias)
            if own is not None:
                self._unreached.add(module)
                tokens = own
            elif not self._counts_once(module, opened):
                return self._on_all_tokens(module, opened, args, kwargs)
        if opened.block is None:
            with self.session.timed("merging", tokens.device):
                tokens = opened.pairing.unmerge(tokens)
        return (tokens, *output[1:]) if several else tokens

    def _counts_once(self, module: nn.Module, opened: _Open) -> bool:
        """Attention that cannot be made to count its keys has run. Whether to take what it gives: one that has seen
        padding, which is nobody's token, is run again on all tokens, or its block is, and is not merged after that."""
        unreached = f"{type(module).__name__} calls neither scaled_dot_product_attention nor softmax"
        if not opened.pairing.padded:
            self.session.note(f"{unreached}: its merged keys count once each")
            return True
        self.session.note(
            f"{unreached}, which images that merge different counts need: passed through (batch_rule='max' merges it)"
        )
        self._blind.add(module)
        if opened.block is not None:
            opened.block.spoiled = True
        return opened.block is not None

    def _on_all_tokens(self, module: nn.Module, opened: _Open, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.session.take_back(opened.layer, opened.given, opened.pairing)
        args, kwargs = _with_tokens(opened.given, _tokens(args, kwargs), args, kwargs)
        return module.forward(*args, **kwargs)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_compiling():
            self._feed_forward.begin_compiled()
            x, time = _latent_and_time(args, kwargs)
            if not isinstance(x, Tensor) or x.ndim not in (4, 5):
                return None
            return _with_tokens(self._compiled.begin(x, time), x, args, kwargs)
        try:
            self._begin_call(module, args, kwargs)
        except Exception as error:
            self._report(error)
        return None

    def _begin_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._abandon()
        self._compiled.root_runs_uncompiled()
        # a compiled call tells of itself, and nobody ends it
        current = self.session.current
        if not self.session.suspended and (current is None or current is self._compiled.own_call):
            call = self._of(module, args, kwargs)
            if call is not None:
                self._call = self.session.call(call)
                self._call.__enter__()
        if self._apart:
            self.session.note(
                "blocks that are compiled one by one cannot be merged whole in one part of a run: there they run on "
                "all tokens (compile the whole model, or merge blocks in all of the run)"
            )
        self._wake()
        self._feed_forward.follow()

    def _of(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelCall | None:
        """What a call is; one that a CUDA graph will replay passes through, as a replay asks nobody."""
        if is_captured():
            self.session.note("a CUDA graph is being captured, which cannot decide in each step: passed through")
            return ModelCall(None, None, (), ())
        return self._describe(module, args, kwargs)

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self._reached and not self._resting:
            self._reached = True  # once is enough
            self._compiled.unreached(type(module).__name__)
        if is_compiling():
            return None if self._observe is None else self._compiled.observe(output)
        try:
            self._end_call(module, output)
        except Exception as error:
            self._report(error)
        return None

    def _end_call(self, module: nn.Module, output: Any) -> None:
        if self._idle:
            self._rest()
        if self._call is not None:
            call, self._call = self._call, None
            call.__exit__(None, None, None)
            if self._observe is not None:
                self._observe(module, output)


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The (b n c) tensor that a layer works on: its first argument."""
    x = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
    return x if isinstance(x, Tensor) and x.ndim == 3 else None


def _with_tokens(
    merged: Tensor, x: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments with `merged` wherever x was: some hosts hand x over as the context too."""
    return tuple(merged if a is x else a for a in args), {k: merged if v is x else v for k, v in kwargs.items()}


def _attends_to_itself(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an attention layer has no other context, nor a mask made for all tokens."""
    others = [*args[1:], *(v for k, v in kwargs.items() if k not in ("hidden_states", "x"))]
    return not any(isinstance(other, Tensor) and other is not x for other in others)


def _needs_all(kwargs: dict[str, Any]) -> bool:
    """Whether a layer or a block is called in a way that all its tokens must be there for: a reference pass writes
    them down, IP-Adapter's masks are cut to their number."""
    named = {**kwargs, **(kwargs.get("cross_attention_kwargs") or {})}
    return writes_reference(kwargs) or named.get("ip_adapter_masks") is not None


def _latent_and_time(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """What a whole model is called with."""
    x = args[0] if args else kwargs.get("sample", kwargs.get("x", kwargs.get("input")))
    named = [kwargs[k] for k in ("timestep", "timesteps", "t", "sigma") if k in kwargs]
    # PixArt's second argument is its text, and has more dimensions
    placed = [a for a in args[1:2] if isinstance(a, (int, float)) or (isinstance(a, Tensor) and a.ndim <= 1)]
    times = named + placed
    return x, times[0] if times else None


def _call_of(
    branches: tuple[str, ...] | None, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ModelCall | None:
    """What a call of a whole model says by itself: its latent's size, its noise level, its batch."""
    x, time = _latent_and_time(args, kwargs)
    if not isinstance(x, Tensor) or x.ndim != 4:
        return None
    sigma = None
    if time is not None:
        sigma = float(time.max()) if isinstance(time, Tensor) else float(time)
        if not hasattr(root, "sigmas"):  # a timestep, of the schedule that Stable Diffusion and most others learnt
            sigma = _sigmas()[min(max(round(sigma), 0), _TIMESTEPS - 1)]
    b = x.shape[0]
    if branches is None or b % len(branches):
        return ModelCall(sigma, (x.shape[-2], x.shape[-1]), ("cond",) * b, tuple(range(b)))
    return ModelCall.chunked(sigma, (x.shape[-2], x.shape[-1]), branches, b // len(branches))


def _root_of(model: Any) -> nn.Module:
    """The module tree of a model: itself, or a pipeline's U-Net or transformer."""
    for candidate in (model, getattr(model, "unet", None), getattr(model, "transformer", None)):
        if isinstance(candidate, nn.Module):
            inner = getattr(candidate, "_orig_mod", None)  # what torch.compile wraps: its hooks are in the graph
            return inner if isinstance(inner, nn.Module) else candidate
    raise ValueError(f"{type(model).__name__} is not a torch module and has no 'unet' or 'transformer' that is one")


def _others(root: nn.Module) -> list[MergeSession]:
    """Sessions at work on any part of a module tree."""
    if not _attached:
        return []
    parts = set(root.modules())
    return [
        a.session for other, stack in _attached.items() if other in parts or root in set(other.modules()) for a in stack
    ]


def apply_patch(
    model: Any,
    config: MergeConfig | None = None,
    *,
    branches: Sequence[str] | None = None,
    sigmas: Sequence[float] | None = None,
) -> MergeSession:
    """Merge tokens in `model` until :func:`remove_patch`. Prefer :func:`merging`, which undoes itself.

    Args:
        model: a module tree with ``attn1`` layers (ldm, sgm, diffusers), or a diffusers pipeline. Of a pipeline, noise
            levels, guidance, frames and importance are known without being told, and each call of it is a fresh run;
            the session's statistics are of the last one.
        config: by default ``MergeConfig()``.
        branches: how the batches of a model that is called directly are laid out, such as ("uncond", "cond"); a
            :class:`tome_sampler.CFGDenoiser` and pipelines tell it by themselves.
        sigmas: the schedule that will be sampled, if known.

    Raises:
        ValueError: nothing in the model matches, or it is of an unsupported kind; the model is as it was.
    """
    root = _root_of(model)
    config = MergeConfig() if config is None else config
    if not isinstance(config, MergeConfig):
        raise ValueError(f"config is {config!r}; it must be a MergeConfig, such as MergeConfig.preset('fast')")
    told = None if branches is None else tuple(branches)
    # a pipeline's runs are told apart by its timesteps
    session = MergeSession(config, sigmas, restarts=is_pipeline(model))
    describe, observe = _told_by(model, root, session, told, sigmas)
    _attach(root, session, describe, observe=observe)
    return session


def _told_by(
    model: Any, root: nn.Module, session: MergeSession, branches: tuple[str, ...] | None, sigmas: Sequence[float] | None
) -> tuple[Describe, Observe | None]:
    """Who says what a model's calls are: a pipeline, or the call itself."""
    if not is_pipeline(model):
        return partial(_call_of, branches), None
    require_known(model, root)
    calls = PipelineCalls(model, session, branches, sigmas)

    def describe(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelCall | None:
        x, time = _latent_and_time(args, kwargs)
        return calls.call(root, x, time, kwargs) if isinstance(x, Tensor) and x.ndim in (4, 5) else None

    return describe, calls.observe


@contextmanager
def attached(model: Any, session: MergeSession) -> Iterator[None]:
    """Within it, a session that the caller has made works on a model or a pipeline. Errors are as of
    :func:`apply_patch`."""
    root = _root_of(model)
    describe, observe = _told_by(model, root, session, None, None)
    attachment = _attach(root, session, describe, observe=observe)
    try:
        yield
    finally:
        _remove(root, attachment)


def attach(
    root: nn.Module, session: MergeSession, describe: Describe, failed: Callable[[Exception], None]
) -> Callable[[], None]:
    """Put a session that a host adapter keeps to work on a module tree; returns what takes it off again.

    Args:
        describe: is asked what each call of `root` is.
        failed: is told of an error of ours in a layer, which then runs on all its tokens.

    Raises:
        ValueError: nothing in the model matches; the model is as it was.
    """
    return partial(_remove, root, _attach(root, session, describe, failed))


def _attach(
    root: nn.Module,
    session: MergeSession,
    describe: Describe,
    failed: Callable[[Exception], None] | None = None,
    observe: Observe | None = None,
) -> _Attachment:
    attachment = _Attachment(root, session, describe, failed, observe)
    attachment.suspends = [other for other in _others(root) if not other.suspended]
    for other in attachment.suspends:  # the innermost of nested sessions works, the others wait
        other.suspended = True
    _attached.setdefault(root, []).append(attachment)
    if not HAS_OPERATORS and failed is None:  # the WebUIs compile nothing
        run_uncompiled(root)
    return attachment


def remove_patch(model: Any) -> Any:
    """Undo the last :func:`apply_patch` of a model, without a trace; one that has none is left alone. Returns it."""
    root = _root_of(model)
    if _attached.get(root):
        _remove(root, _attached[root][-1])
    return model


def _remove(root: nn.Module, attachment: _Attachment) -> None:
    stack = _attached.get(root, [])
    if attachment in stack:
        stack.remove(attachment)
        attachment.remove()
        attachment.session.release()
        if not stack:
            del _attached[root]
            run_as_before(root)
        above = next((a for those in _attached.values() for a in those if attachment.session in a.suspends), None)
        if above is not None:  # taken off out of turn: what waited for it waits for the one that it waited for
            above.suspends.remove(attachment.session)
            above.suspends += attachment.suspends
        else:
            for other in attachment.suspends:
                other.suspended = False


@contextmanager
def merging(
    model: Any,
    config: MergeConfig | None = None,
    *,
    branches: Sequence[str] | None = None,
    sigmas: Sequence[float] | None = None,
) -> Iterator[MergeSession]:
    """Within it, `model` runs on merged tokens; leaving restores it bit for bit, also after an exception.

    Arguments and errors are those of :func:`apply_patch`.
    """
    session = apply_patch(model, config, branches=branches, sigmas=sigmas)
    root = _root_of(model)
    attachment = next(a for a in _attached[root] if a.session is session)
    try:
        yield session
    finally:
        _remove(root, attachment)
