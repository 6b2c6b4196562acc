"""Why merging stands aside: other tools that reshape or merge the same tokens, and models without any."""

from __future__ import annotations

from typing import Any

from modules import shared

_OWN_KERNELS = ("xformers", "sub-quadratic")
"""The host's attention that calls neither torch's attention nor its softmax: ours stands in for it, and a hypernetwork
is not part of ours."""


def obstacle(p: Any) -> str | None:
    """The reason to leave a pass of `p` unmerged, or None. Settings are settled by the time a pass starts."""
    is_hires = bool(getattr(p, "is_hr_pass", False))
    ratio = p.get_token_merging_ratio(for_hr=is_hires) if hasattr(p, "get_token_merging_ratio") else 0
    if ratio:
        return f"the host's own token merging is on (ratio {ratio:g}); set it to 0 in the settings to use this one"
    options = shared.opts.data
    second = is_hires and options.get("hypertile_enable_unet_secondpass")
    if (options.get("hypertile_enable_unet") or second) and not hasattr(p.sd_model, "forge_objects"):
        return "Hypertile is on for the U-Net; switch it off in the settings to use this one"
    if getattr(shared, "loaded_hypernetworks", None) and not hasattr(p.sd_model, "forge_objects"):
        attention = _attention()
        if attention in _OWN_KERNELS:
            return (
                f"a hypernetwork acts inside attention of a kind that cannot be reached ({attention}); choose another "
                "cross attention optimization, such as sdp or Doggettx, to use both"
            )
    try:
        from modules import sd_unet
    except ImportError:
        return None
    alternative = getattr(sd_unet, "current_unet", None)
    if alternative is not None:
        return f"an alternative U-Net is in use ({type(alternative).__name__}), whose attention cannot be reached"
    return None


def _attention() -> str | None:
    """The host's cross attention optimization, by its name."""
    try:
        from modules.sd_hijack import model_hijack
    except ImportError:
        return None
    return getattr(model_hijack, "optimization_method", None)
