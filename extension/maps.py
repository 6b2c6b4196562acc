"""The maps of a run, drawn over its picture."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tome_sampler.overlay import group_map, heat_map, to_bytes

from .record import Map

KINDS = ("importance", "groups")
LONG_SIDE = 768


def drawn(one: Map, picture: Image.Image | None, kind: str) -> Image.Image | None:
    """A map over a run's picture (or over grey); None where there was no importance. While its pass is under way a
    map lies on the device.

    Args:
        kind: "importance": bright where guidance changed most. "groups": what was merged into what.
    """
    h, w = one.grid
    scale = LONG_SIDE / max(h, w)
    size = (max(round(w * scale), 1), max(round(h * scale), 1))
    base = (picture or Image.new("RGB", size, (128, 128, 128))).convert("RGB").resize(size, Image.LANCZOS)
    if kind == "importance":
        if one.importance is None:
            return None
        heat = _image(heat_map(one.importance.float().cpu())).resize(size, Image.BICUBIC)
        return Image.blend(base, heat, 0.6)
    pixels = torch.from_numpy(np.asarray(base).copy()).permute(2, 0, 1).float() / 127.5 - 1
    return _image(group_map(pixels, one.target.cpu().long(), one.grid, LONG_SIDE)).resize(size, Image.NEAREST)


def png(image: Image.Image) -> bytes:
    """As a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _image(picture: Tensor) -> Image.Image:
    return Image.fromarray(to_bytes(picture).numpy())
