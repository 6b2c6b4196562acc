"""What was asked for, as plain data that a picture carries and another run reads back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tome_sampler.config import MergeConfig

KEY = "tome_sampler"
"""The name of the text chunk of a PNG that holds the request."""
_FRAME = 125  # milliseconds: AnimateDiff's clips have eight frames a second


@dataclass(frozen=True)
class Request:
    """One picture or clip, or, with several prompts or a count, several.

    motion: motion modules, by which a model of single pictures draws clips. frames: of a clip. prompts: one or more.
    seed: of the first picture; each next one has the next. count: pictures of each prompt. size: (height, width) in
    pixels. scheduler: None: `sampler`, of k-diffusion; else the pipeline's own loop, with a scheduler of this name ("":
    its own one). merging: ``MergeConfig.to_dict``, or None: plain. image: a picture's path to start from, and strength,
    how much of it may change, 0 .. 1. What is None is as the model usually has it.
    """

    prompts: tuple[str, ...]
    model: str = "embedded"
    model_config: str | None = None
    motion: str | None = None
    frames: int | None = None
    dtype: str = "fp32"
    negative: str = ""
    seed: int = 0
    count: int = 1
    size: tuple[int, int] | None = None
    steps: int | None = None
    sampler: str | None = None
    scheduler: str | None = None
    cond_scale: float | None = None
    merging: dict[str, Any] | None = None
    image: str | None = None
    strength: float = 0.6

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if self.size is not None:
            object.__setattr__(self, "size", tuple(self.size))
        if not self.prompts or not all(isinstance(prompt, str) for prompt in self.prompts):
            raise ValueError("there is no prompt: say what to draw, or give --from-png")
        if self.count < 1:
            raise ValueError(f"count is {self.count}; it must be at least 1")

    @property
    def config(self) -> MergeConfig | None:
        """The settings of merging."""
        return None if self.merging is None else MergeConfig.from_dict({"early_ratio": None, **self.merging})

    def one(self, prompt: str, seed: int, merging: MergeConfig | None) -> Request:
        """The request of a single one of its pictures."""
        plain = None if merging is None else merging.to_dict()
        return replace(self, prompts=(prompt,), seed=seed, count=1, merging=plain)

    def to_text(self) -> str:
        """JSON; :meth:`from_data` takes it back, parsed."""
        return json.dumps(asdict(self))

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Request:
        """The request that :meth:`to_text` wrote.

        Raises:
            ValueError: a field is unknown, missing or out of range.
        """
        known = {field.name for field in fields(cls)}
        for name in data:
            if name not in known:
                raise ValueError(f"the picture's settings have a field {name!r} that is unknown here")
        if "prompts" not in data:
            raise ValueError("the picture's settings have no prompts")
        return cls(**data)


def write_png(frames: Sequence[Image.Image], path: Path, request: Request) -> None:
    """Save a picture, or the frames of a clip as an animated PNG, with the request that it is the answer to."""
    info = PngInfo()
    info.add_text(KEY, request.to_text())
    moves: dict[str, Any] = {}
    if len(frames) > 1:  # PNG holds a clip without loss and with the same text in it, and browsers play it
        moves = {"save_all": True, "append_images": frames[1:], "duration": _FRAME, "loop": 0}
    frames[0].save(path, pnginfo=info, **moves)


def read_png(path: Path) -> Request:
    """The request that a picture carries.

    Raises:
        ValueError: the file is missing, is no picture, or carries none.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get(KEY)
    except FileNotFoundError:
        raise ValueError(f"there is no {path}") from None
    except OSError as error:
        raise ValueError(f"{path} is no picture: {error}") from None
    try:
        data = json.loads(text) if isinstance(text, str) else None
    except json.JSONDecodeError:
        data = None
    if not isinstance(data, dict):
        raise ValueError(f"{path} carries no settings of tome-sampler generate")
    return Request.from_data(data)
