"""What foreign packages do to a model, taken off without a trace between turns, and put on again with its state."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_CONTAINERS = (dict, OrderedDict, set, list)


class _State:
    """Class and attributes of every module of a tree; of containers that were there before, what is in them.

    Packages swap classes, add attributes and fill hook dicts, and their own clean-up forgets some of it.
    """

    def __init__(self, root: nn.Module, before: _State | None = None) -> None:
        self._modules = [
            (m, type(m), dict(vars(m)), {k: copy.copy(v) for k, v in vars(m).items() if type(v) in _CONTAINERS})
            for m in root.modules()
        ]
        if before is not None:  # a package's own containers stay alive as they are
            for (*_, contents), (_, _, known, _) in zip(self._modules, before._modules, strict=True):
                for name in contents.keys() - known.keys():
                    del contents[name]

    def restore(self) -> None:
        for module, kind, attributes, contents in self._modules:
            module.__class__ = kind
            own = vars(module)
            for name in own.keys() - attributes.keys():
                del own[name]
            own.update(attributes)
            for name, content in contents.items():
                held: Any = own[name]
                if not _same(held, content):
                    held.clear()
                    held.extend(content) if isinstance(held, list) else held.update(content)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):  # by identity: tensors are no truth values
        return list(a) == list(b) and all(a[k] is b[k] for k in a)
    return bool(a == b)


@contextmanager
def restored(root: nn.Module) -> Iterator[None]:
    """Whatever is done to a module tree within it is undone at its end."""
    before = _State(root)
    try:
        yield
    finally:
        before.restore()


class Patch:
    """A package's patch of `root`, which `apply` makes once; :meth:`on` puts it on for a turn."""

    def __init__(self, root: nn.Module, apply: Callable[[], None]) -> None:
        self._root, self._apply = root, apply
        self._kept: _State | None = None

    @contextmanager
    def on(self) -> Iterator[None]:
        before = _State(self._root)
        try:
            if self._kept is None:
                self._apply()
            else:
                self._kept.restore()
            yield
        finally:
            self._kept = _State(self._root, before)
            before.restore()

    def forget(self) -> None:
        """Apply it anew at the next turn, without what it remembers."""
        self._kept = None
