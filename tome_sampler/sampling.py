"""k-diffusion's samplers, by their names: ``from tome_sampler.sampling import sample_dpmpp_2m``.

They are k-diffusion's own objects, unmodified, and found when asked for: one that it gains later appears by itself.
"""

from __future__ import annotations

import difflib
from typing import Any

from tome_sampler import kdiffusion


def sampler_names() -> list[str]:
    """The names of all ``sample_*`` functions that k-diffusion has.

    Raises:
        ImportError: there is no k-diffusion.
    """
    return sorted(name for name in vars(kdiffusion.load("sampling")) if name.startswith("sample_"))


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    sampling = kdiffusion.load("sampling")
    if not hasattr(sampling, name):
        near = difflib.get_close_matches(name, sampler_names(), n=3) or sampler_names()
        raise AttributeError(f"k_diffusion.sampling has no {name!r}; did you mean {', '.join(near)}?")
    return getattr(sampling, name)


def __dir__() -> list[str]:
    try:
        return sorted({*globals(), *(n for n in vars(kdiffusion.load("sampling")) if not n.startswith("_"))})
    except ImportError:
        return sorted(globals())
