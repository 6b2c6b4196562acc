"""A CUDA device where there is none: which operators run, on what, and what waits. There are no numbers in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)

_aten = torch.ops.aten
_VIEWS = ("alias", "detach", "expand", "permute", "select", "slice", "split", "squeeze", "t", "transpose", "unsqueeze")
_NO_KERNEL = {*_VIEWS, "_unsafe_view", "device", "empty", "empty_like", "lift_fresh", "new_empty", "view"}


class _Dispatched(TorchFunctionMode):
    """What Tensor's methods ask a CUDA build for before they get to an operator, done by the operators."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return _indexed(*args)
        if func is Tensor.contiguous and not args[0].is_contiguous():
            return _aten.clone(args[0], memory_format=torch.contiguous_format)
        if func is Tensor.contiguous:
            return args[0]
        if func is Tensor.__invert__:
            return _aten.bitwise_not(args[0])
        return func(*args, **(kwargs or {}))


def _indexed(x: Tensor, index: Any) -> Tensor:
    index = index if isinstance(index, tuple) else (index,)
    if Ellipsis in [i if i is Ellipsis else None for i in index]:
        at = next(place for place, i in enumerate(index) if i is Ellipsis)
        missing = x.ndim - sum(i is not None and i is not Ellipsis for i in index)
        index = (*index[:at], *(slice(None),) * missing, *index[at + 1 :])
    dim, tensors = 0, []
    for i in index:
        if isinstance(i, int):
            x = _aten.select(x, dim, i)
            continue
        if i is None:
            x = _aten.unsqueeze(x, dim)
        elif isinstance(i, slice) and i != slice(None):
            x = _aten.slice(x, dim, i.start, i.stop, i.step or 1)
        tensors.append(i if isinstance(i, Tensor) else None)
        dim += 1
    return _aten.index(x, tensors) if any(t is not None for t in tensors) else x


class Launches(TorchDispatchMode):
    """Counts the operators that launch something, and names those that the host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, out = func.overloadpacket.__name__, func(*args, **kwargs)
        if name not in _NO_KERNEL:
            self.counts[name] += 1
        if name == "_to_copy" and out.device != args[0].device and not kwargs.get("non_blocking"):
            self.waits.append(f"a copy from {args[0].device} to {out.device}")
        return out


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Within it tensors can be made on, and computed with as if on, a CUDA device. What mixes them with others, or
    asks for a number, raises."""
    with FakeTensorMode(), _Dispatched():
        query = torch.empty(1, 1, 8, 8, device=CUDA, dtype=torch.float16)
        try:
            functional.scaled_dot_product_attention(query, query, query)
        except RuntimeError:
            if not torch.backends.cuda.is_built() or torch.cuda.is_available():
                raise
            pytest.skip("this torch asks CUDA's driver which kernel to take, and there is none")
        yield


def on_cuda(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A module, within :func:`fake_cuda`, with parameters and buffers there."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            there = torch.empty(parameter.shape, dtype=dtype, device=CUDA)
            part._parameters[name] = nn.Parameter(there, requires_grad=False)
        for name, buffer in list(part.named_buffers(recurse=False)):
            part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)
    return module
