"""The feed-forward in two halves while pairs are kept: a model's peak of memory lies in it, and they would raise it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tome_sampler.hosts.compiled import is_compiling
from tome_sampler.session import MergeSession

PreHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
PostHook = Callable[[nn.Module, Any, Any, Any], Any]


class HalvedFeedForward:
    """One session's hooks on the feed-forward layers (``ff``) of a module tree.

    A feed-forward works on each token by itself, so one half of them after the other gives the same tokens, and its
    hidden layer, up to eight times as wide as they are, is half as large at once. That is done where as many numbers
    pass through as in the largest merged layer: with fewer no peak is reached, and the weights would be read twice for
    nothing. On merged tokens, its block's or its own, it is done where more than half of them are left: the tokens
    that were merged lie beside them.

    merging: those of these layers that have hooks which merge: :meth:`around` is told of them, and no hooks are put on
    them here.
    """

    def __init__(self, root: nn.Module, session: MergeSession, merging: Collection[nn.Module | None] = ()) -> None:
        self._session = session
        found = [m._modules.get("ff") for m in root.modules() if "attn1" in m._modules]
        self._layers = [layer for layer in found if layer is not None and layer not in merging and _is_tokenwise(layer)]
        self._hooks = ExitStack()
        self._on = False
        self._least = 0  # how many numbers are halved
        self._in_block = False  # a block is running on merged tokens
        self._halved: tuple[Tensor, int] | None = None  # what is worked off in halves, and along which dimension
        self._put_on()  # before a compiler looks

    def follow(self) -> None:
        """Be there while the session keeps pairs, and only then: a call has begun, or a layer has been merged."""
        self._least = 0 if self._session.suspended else self._session.largest
        self._halved, self._in_block = None, False
        if self._least and not self._on:
            self._put_on()
        elif self._on and not self._least:
            self.remove()

    def enter_block(self) -> None:
        """A block runs on merged tokens, until :meth:`leave_block`."""
        self.follow()
        self._in_block = True

    def leave_block(self) -> None:
        """It has run."""
        self._in_block = False

    def remove(self) -> None:
        """Take the hooks off."""
        self._hooks.close()
        self._on, self._least, self._halved, self._in_block = False, 0, None, False

    def begin_compiled(self) -> None:
        """The compiler looks at a call of the root, in which nothing has been merged yet."""
        self._least, self._halved, self._in_block = 0, None, False

    def merged_compiled(self, x: Tensor, block: bool = False) -> None:
        """A layer, or a block, that is given x will run on merged tokens in the compiler's graph."""
        self._least, self._in_block = max(self._least, x.numel()), block

    def around(self, layer: nn.Module, before: PreHook, after: PostHook) -> tuple[PreHook, PostHook]:
        """Hooks that merge a feed-forward's tokens and share the result, with the halves between them."""
        if not _is_tokenwise(layer):
            return before, after

        def halve(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            merged = before(module, args, kwargs)
            args, kwargs = merged or (args, kwargs)
            return self._halve(module, args, kwargs, merged=merged is not None) or merged

        def complete(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            whole = self._complete(module, args, output)
            shared = after(module, args, kwargs, output if whole is None else whole)
            return whole if shared is None else shared

        return halve, complete

    def _put_on(self) -> None:
        self._on = True
        for layer in self._layers:
            # always_call: an exception inside must not leave a half behind. prepend: others see the whole output
            self._hooks.enter_context(layer.register_forward_pre_hook(self._halve, with_kwargs=True))
            self._hooks.enter_context(layer.register_forward_hook(self._complete, always_call=True, prepend=True))

    def _halve(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], merged: bool = False
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        x = args[0] if len(args) == 1 and not kwargs else None
        if not self._least or not isinstance(x, Tensor) or x.ndim != 3:
            return None
        few = 2 * x.numel() <= self._least if merged or self._in_block else x.numel() < self._least
        if few:
            return None
        if _is_watched(module):
            return None  # somebody else wants to see all tokens
        # rows of a batch are contiguous as they are, parts of a sequence are copied; but a compiler would make a graph
        # for each size of a batch whose half is one row, or two
        dim = 1 if is_compiling() or x.shape[0] == 1 or _is_patched(module) else 0
        self._halved = x, dim
        return (x.tensor_split(2, dim)[0].contiguous(),), {}

    def _complete(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._halved is None:
            return None
        (x, dim), self._halved = self._halved, None
        if output is None:  # an exception is on its way
            return None
        if not isinstance(output, Tensor):
            return module.forward(x)
        return torch.cat([output, module.forward(x.tensor_split(2, dim)[1].contiguous())], dim)


def _is_watched(layer: nn.Module) -> bool:
    """Whether anybody else has hooks on a layer or on a part of it."""
    if len(layer._forward_pre_hooks) > 1 or len(layer._forward_hooks) > 1:
        return True
    return any(part is not layer and (part._forward_pre_hooks or part._forward_hooks) for part in layer.modules())


def _is_patched(layer: nn.Module) -> bool:
    """Whether somebody has replaced the forward of a layer or of a part of it, which may tell cond rows from others."""
    return any("forward" in part.__dict__ for part in layer.modules())


def _is_tokenwise(layer: nn.Module) -> bool:
    """Whether a feed-forward works on each token by itself: a convolution sees its neighbours."""
    return all(weight.ndim <= 2 for weight in layer.parameters())
