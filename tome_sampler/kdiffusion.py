"""The one place that finds k-diffusion. It is never imported before it is needed, and never required.

Why not a plain import: a host's own copy must win (Forge's ``k_diffusion`` has no ``__init__``, so an installed one
would take its place), and the package's ``__init__`` imports training code whose dependencies few users have.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType

_LOCK = threading.RLock()
_TORCHVISION = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")


def load(name: str) -> ModuleType:
    """``k_diffusion.<name>``: the host's copy if it has loaded one, else the installed one, whole or in parts.

    Raises:
        ImportError: there is none, or it cannot be imported; the message says what to install.
    """
    module_name = f"k_diffusion.{name}"
    with _LOCK:
        if module_name in sys.modules:
            return sys.modules[module_name]
        if "k_diffusion" in sys.modules:
            return importlib.import_module(module_name)
        before = set(sys.modules)
        try:
            return importlib.import_module(module_name)
        except Exception:  # whatever the heavy __init__ raises: a missing package, a broken torchvision, ...
            _forget_new("k_diffusion", before)
        try:
            return _load_without_init(module_name)
        except Exception as error:
            _forget_new("k_diffusion", before)
            raise ImportError(
                "k-diffusion is needed for this and cannot be imported: pip install 'tome-sampler[k-diffusion]' "
                f"({type(error).__name__}: {error})"
            ) from error


def _load_without_init(module_name: str) -> ModuleType:
    """A submodule of the installed package, whose ``__init__`` does not run."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("No module named 'k_diffusion'")
    package = ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = importlib.util.spec_from_loader("k_diffusion", None, is_package=True)
    sys.modules["k_diffusion"] = package
    with _torchvision_at_hand():
        return importlib.import_module(module_name)


@contextmanager
def _torchvision_at_hand() -> Iterator[None]:
    """k_diffusion.utils imports ``torchvision.transforms.functional`` for its image helpers, which no sampler uses.
    Where that cannot be imported an empty module stands in, and is gone afterwards: transformers and diffusers look
    for torchvision too."""
    before = set(sys.modules)
    try:
        importlib.import_module(_TORCHVISION[-1])
    except Exception:
        _forget_new("torchvision", before)
    else:
        yield
        return
    hidden = {name: sys.modules.pop(name) for name in _TORCHVISION if name in sys.modules}
    stands_in = {name: ModuleType(name) for name in _TORCHVISION}
    for parent, child in pairwise(_TORCHVISION):
        stands_in[parent].__path__ = []
        setattr(stands_in[parent], child.rpartition(".")[2], stands_in[child])
    sys.modules.update(stands_in)
    try:
        yield
    finally:
        for name in _TORCHVISION:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


def _forget_new(package: str, before: set[str]) -> None:
    """Take back what a failed import left in ``sys.modules``."""
    for name in [n for n in sys.modules if n not in before and (n == package or n.startswith(package + "."))]:
        del sys.modules[name]
