"""The user's own named presets, in one JSON file that only this module touches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tome_sampler.config import MergeConfig
from tome_sampler.profiles import FORMAT as PROFILE
from tome_sampler.saving import write_whole

from .fields import CUSTOM, FIELDS, OFF, PRESETS

MOST = 200
LONGEST_NAME = 60


class Presets:
    """Presets by name, each the plain data of a ``MergeConfig``. A broken file is kept aside and said, not lost."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self) -> dict[str, dict[str, Any]]:
        """What is saved; nothing where there is no file.

        Raises:
            ValueError: the file is no preset file; one line that names it.
        """
        if not self.path.is_file():
            return {}
        return self._read(self.path.read_text("utf-8"), str(self.path))

    def names(self) -> list[str]:
        """In alphabetical order; empty if the file is broken."""
        try:
            return sorted(self.all(), key=str.lower)
        except (ValueError, OSError):
            return []

    def saved(self) -> dict[str, dict[str, Any]]:
        """As :meth:`all`, but empty if the file is broken: for a run that uses none of them."""
        try:
            return self.all()
        except (ValueError, OSError):
            return {}

    def save(self, name: str, config: MergeConfig) -> None:
        """Add or replace one.

        Raises:
            ValueError: the name is taken by one that differs in case only, or a value is out of the controls' range.
        """
        presets = self.all()
        presets[_unlike(_checked(name), presets)] = _in_range(config).to_dict()
        self._write(presets)

    def rename(self, old: str, new: str) -> None:
        """Give one another name."""
        presets = self.all()
        if old not in presets:
            raise ValueError(f"there is no preset {old!r} of your own")
        if _checked(new) in presets and new.strip() != old:
            raise ValueError(f"there is a preset {new.strip()!r} already")
        renamed = presets.pop(old)
        presets[_unlike(_checked(new), presets)] = renamed
        self._write(presets)

    def delete(self, name: str) -> None:
        """Remove one."""
        presets = self.all()
        if name not in presets:
            raise ValueError(f"there is no preset {name!r} of your own")
        del presets[name]
        self._write(presets)

    def exported(self) -> str:
        """All of them, as JSON that :meth:`load` takes."""
        return json.dumps(self.all(), indent=2, sort_keys=True)

    def load(self, text: str) -> tuple[list[str], list[str]]:
        """Add what another one exported, or a profile of ``tome-sampler inspect --tune``, which is named after its
        model; the names that are new, and those that took the place of one. Nothing is added if any of it is wrong."""
        source, before = "the imported text", self.all()
        presets = dict(before)
        found = self._read(text, source)
        for name, fields in found.items():
            try:
                presets[_unlike(name, presets)] = _in_range(MergeConfig.from_dict(fields)).to_dict()
            except ValueError as error:
                raise ValueError(f"{source}: preset {name!r}: {error}") from None
        self._write(presets)
        return [name for name in found if name not in before], [name for name in found if name in before]

    def _read(self, text: str, source: str) -> dict[str, dict[str, Any]]:
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{source} is not JSON: {error}") from None
        if not isinstance(data, dict):
            raise ValueError(f"{source} must be an object of presets by name")
        if data.get("format") == PROFILE:
            data = {Path(str(data.get("model"))).name[:LONGEST_NAME]: data.get("config")}
        presets = {}
        for name, fields in data.items():
            if not isinstance(fields, Mapping):
                raise ValueError(f"{source}: preset {name!r} must be an object of settings")
            try:
                # what was saved before runs had an early part, and names all other fields, had none
                presets[_checked(name)] = MergeConfig.from_dict({"early_ratio": None, **fields}).to_dict()
            except (ValueError, TypeError) as error:
                raise ValueError(f"{source}: preset {name!r}: {error}") from None
        return presets

    def _write(self, presets: Mapping[str, Any]) -> None:
        if len(presets) > MOST:
            raise ValueError(f"there would be {len(presets)} presets; at most {MOST} can be kept")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(presets, indent=2, sort_keys=True).encode())


def _checked(name: Any) -> str:
    if not isinstance(name, str) or not name.strip() or len(name.strip()) > LONGEST_NAME or not name.isprintable():
        raise ValueError(f"name is {name!r}; it must be 1 to {LONGEST_NAME} printable characters")
    taken = {known.lower() for known in (OFF, CUSTOM, *PRESETS, *PRESETS.values(), "default")}
    if name.strip().lower() in taken:
        raise ValueError(f"name is {name!r}, which is one of the built-in presets; choose another")
    return name.strip()


def _unlike(name: str, presets: Mapping[str, Any]) -> str:
    """`name`, which only one of `presets` may have: callers may write names in any case."""
    for other in presets if name not in presets else ():
        if other.lower() == name.lower():
            raise ValueError(f"name is {name!r}, which differs from the preset {other!r} in case only; choose another")
    return name


def _in_range(config: MergeConfig) -> MergeConfig:
    """`config`, as the controls and infotexts can hold it: the library's own ranges are wider."""
    return config.with_(**{field.name: field.read(getattr(config, field.name)) for field in FIELDS})
