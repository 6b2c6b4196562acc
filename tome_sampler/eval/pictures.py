"""Pictures as files."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tome_sampler.eval.methods import Method
from tome_sampler.eval.prompts import Case
from tome_sampler.overlay import to_bytes
from tome_sampler.saving import write_whole

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def path_of(folder: Path, method: Method, case: Case) -> Path:
    """Where a picture is kept: a folder a method, a file a prompt and seed."""
    return folder / re.sub(r"[^\w.=-]+", "_", method.label) / f"{case.number:05d}-{case.seed}.png"


def save_picture(path: Path, picture: Tensor) -> None:
    """Write a picture (3 h w) in [-1, 1] as a PNG, whole or not at all.

    Raises:
        OSError: it could not be written.
    """
    content = io.BytesIO()
    Image.fromarray(to_bytes(picture).numpy()).save(content, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())


def read_picture(path: Path) -> Tensor:
    """A picture (3 h w), bytes.

    Raises:
        ValueError: it is no picture.
    """
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is not a readable picture ({error})") from None


def read_pictures(folder: Path) -> list[Tensor]:
    """All pictures of a folder.

    Raises:
        ValueError: there is no such folder, it has none, one cannot be read, or they differ in size.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; it must be one of pictures")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS)
    if not paths:
        raise ValueError(f"{folder} has no pictures ({', '.join(_ENDINGS)})")
    pictures = [read_picture(path) for path in paths]
    for path, picture in zip(paths, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            first, here = (f"{p.shape[2]}x{p.shape[1]}" for p in (pictures[0], picture))
            raise ValueError(f"{path} is {here} and {paths[0].name} is {first}; all must have one size")
    return pictures
