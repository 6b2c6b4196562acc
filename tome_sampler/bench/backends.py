"""Which kernel attention runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

BACKENDS = ("auto", "flash", "efficient", "math", "xformers")


def _only(backend: str) -> AbstractContextManager[Any]:
    if backend not in ("flash", "efficient", "math"):
        return nullcontext()
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:  # torch 2.1 and 2.2
        flags = {f"enable_{name}": name == backend for name in ("flash", "math")}
        return torch.backends.cuda.sdp_kernel(**flags, enable_mem_efficient=backend == "efficient")
    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    return sdpa_kernel(kernels[backend])


@contextmanager
def attention_on(backend: str, model: nn.Module) -> Iterator[None]:
    """Within it, `model`'s attention runs on this backend; xformers is put into the model and stays there.

    Raises:
        ValueError: torch has no such kernel for this device and dtype. ImportError: there is no xformers.
    """
    weight = next(model.parameters())
    if backend == "xformers":
        try:
            model.enable_xformers_memory_efficient_attention()  # type: ignore[operator]
        except ModuleNotFoundError:
            raise ImportError("backend is 'xformers', which is not installed; pip install xformers") from None
    probe = torch.zeros(1, 1, 8, 8, dtype=weight.dtype, device=weight.device)
    with _only(backend):
        try:
            F.scaled_dot_product_attention(probe, probe, probe)
        except RuntimeError:
            raise ValueError(
                f"backend is {backend!r}; torch {torch.__version__} has no such kernel for "
                f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}; 'auto' takes the one it has"
            ) from None
        yield
