"""What was asked for, as plain data that a picture carries and another run reads back."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tome_sampler.config import MergeConfig

KEY = "tome_sampler"
"""The name of the text chunk of a PNG that holds the request."""
_LAST_SEED = 2**63 - 1  # that torch's generators take
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)  # of damaged files, by Pillow
_FRAME = 125  # milliseconds: AnimateDiff's clips have eight frames a second


@dataclass(frozen=True)
class Request:
    """One picture or clip, or, with several prompts or a count, several.

    motion: motion modules, by which a model of single pictures draws clips. frames: of a clip. prompts: one or more.
    seed: of the first picture; each next one has the next. count: pictures of each prompt. size: (height, width) in
    pixels. scheduler: None: `sampler`, of k-diffusion; else the pipeline's own loop, with a scheduler of this name ("":
    its own one). merging: ``MergeConfig.to_dict``, or None: plain. image: a picture's path to start from, and strength,
    how much of it may change, 0 .. 1. What is None is as the model usually has it.

    Raises:
        ValueError: there is no prompt, or a number is out of range.
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
        most = _LAST_SEED + 1 - self.count * len(self.prompts)
        if not 0 <= self.seed <= most:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to {most}, as each next picture has the next")
        if self.cond_scale is not None and not math.isfinite(self.cond_scale):
            raise ValueError(f"cond_scale is {self.cond_scale}; it must be a finite number")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength is {self.strength:g}; it must be from 0 to 1")

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
            ValueError: a field is unknown, missing, of another type or out of range.
        """
        kinds = get_type_hints(cls)
        for name, value in data.items():
            if name not in kinds:
                raise ValueError(f"the picture's settings have a field {name!r} that is unknown here")
            if not _is(value, kinds[name]):
                said, kind = textwrap.shorten(repr(value), 60), cls.__annotations__[name]
                raise ValueError(f"the picture's settings say that {name} is {said}; it must be {kind}")
        if "prompts" not in data:
            raise ValueError("the picture's settings have no prompts")
        found = cls(**data)
        try:
            found.config  # noqa: B018  (which says what is wrong with it)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"the picture's settings of merging cannot be read: {error}") from None
        return found


def _is(value: Any, kind: Any) -> bool:
    """Whether a value that JSON gave is of a field's type."""
    if isinstance(kind, UnionType):
        return any(_is(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        items = [one for one in get_args(kind) if one is not Ellipsis]
        if not isinstance(value, (list, tuple)) or (len(items) > 1 and len(items) != len(value)):
            return False
        return all(_is(item, items[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and not isinstance(value, bool)


def write_png(frames: Sequence[Image.Image], path: Path, request: Request) -> None:
    """Save a picture, or the frames of a clip as an animated PNG, with the request that it is the answer to."""
    info = PngInfo()
    info.add_text(KEY, request.to_text())
    moves: dict[str, Any] = {}
    if len(frames) > 1:  # PNG holds a clip without loss and with the same text in it, and browsers play it
        moves = {"save_all": True, "append_images": frames[1:], "duration": _FRAME, "loop": 0}
    frames[0].save(path, pnginfo=info, **moves)


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """A picture file; what cannot be read of it, then and within, is said in a line.

    Raises:
        ValueError: it is missing, or no picture that can be read.
    """
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise ValueError(f"there is no {path}") from None
    except _UNREADABLE as error:
        raise ValueError(f"{path} is no picture that can be read: {error}") from None


def read_png(path: Path) -> Request:
    """The request that a picture carries.

    Raises:
        ValueError: the file is missing, is no picture, or carries none.
    """
    with opened(path) as image:
        text = image.info.get(KEY)
    try:
        data = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise ValueError(f"{path} carries no settings of tome-sampler generate")
    return Request.from_data(data)
