"""tome-sampler: merges alike tokens while a diffusion model samples, so that high resolutions take less time.

>>> with tome_sampler.merging(unet, MergeConfig.preset("balanced")) as session:
...     denoiser = tome_sampler.CFGDenoiser(model_wrap, session)
...     x = sample_dpmpp_2m(denoiser, x, sigmas, extra_args={"cond": cond, "uncond": uncond, "cond_scale": 7.5})
"""

from tome_sampler.config import PRESETS, MergeConfig
from tome_sampler.denoiser import CFGDenoiser
from tome_sampler.hosts.modules import apply_patch, merging, remove_patch
from tome_sampler.pairing import Pairing
from tome_sampler.session import Layer, MergeSession, ModelCall

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "CFGDenoiser",
    "Layer",
    "MergeConfig",
    "MergeSession",
    "ModelCall",
    "Pairing",
    "apply_patch",
    "merging",
    "remove_patch",
]
