"""What a picture's parameters say of the merging, and back: the preset's name, and what differs from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from tome_sampler.config import MergeConfig
from tome_sampler.refresh import SigmaRatio

from .fields import CUSTOM, FIELDS, OFF, TITLE
from .record import PassRecord
from .request import Request, default_args, hires_controls, preset_config, preset_name, read_args

KEY = TITLE
HIRES_KEY = "ToMe hires"
ASIDE = "stood aside"
EDITION_KEY, EDITION = "ToMe presets", "2"
_OLD = MergeConfig(ratio=0.5, threshold=0.9, floor=0.3, early_ratio=None, refresh=SigmaRatio(6.0))
FIRST_EDITION = {
    CUSTOM: _OLD,
    "Balanced": _OLD,
    "Quality": _OLD.with_(floor=0.25, refresh=SigmaRatio(4.0)),
    "Fast": _OLD.with_(ratio=0.9, floor=0.75, stride=4),
}
"""An infotext holds a preset's name and what differs from it, so it must say which preset of that name. Those without
an edition were written before runs had an early part, and mean these; presets that are not here are the same today."""


def written(request: Request, saved: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, str]:
    """The infotext's entries of a request; none when it is off."""
    if not request.on:
        return {}
    entries = {KEY: _known(request.preset, saved), EDITION_KEY: EDITION}
    entries |= _entries(request.preset, request.config, "ToMe ")
    if not request.same:
        entries |= {HIRES_KEY: _known(request.hires_preset, saved)}
        entries |= _entries(request.hires_preset, request.hires, "ToMe hires ")
    return entries


def of_passes(entries: Mapping[str, str], passes: Sequence[PassRecord]) -> dict[str, str]:
    """A request's entries, and which of the passes it reached were not merged, or not to their end: if all stood
    aside, nothing but why."""
    if passes and all(one.aside for one in passes):
        return {KEY: f"{ASIDE}: {'; '.join(dict.fromkeys(one.aside for one in passes))}"}
    notes = {one.title.lower(): f"{ASIDE}: {one.aside}" if one.aside else one.failed for one in passes}
    return {**entries, **{f"ToMe {name}": note for name, note in notes.items() if note}}


def control_values(params: Mapping[str, Any]) -> list[Any]:
    """The page's controls in order, as an infotext's entries set them; off when it says nothing of merging."""
    values = default_args()
    told = params.get(KEY)
    if not isinstance(told, str) or told.startswith(ASIDE):
        return values
    name, config = _told(told, params, "ToMe ")
    values[0], values[1] = True, name
    if config is not None:
        values[2 : 2 + len(FIELDS)] = [field.shown(config) for field in FIELDS]
    if isinstance(params.get(HIRES_KEY), str):
        hires_name, hires = _told(params[HIRES_KEY], params, "ToMe hires ")
        if hires is not None and hires != preset_config(hires_name):
            hires_name = CUSTOM
        values[2 + len(FIELDS) :] = [True, hires_name, *hires_controls(hires or MergeConfig(), config)]
    try:
        read_args(values)
    except ValueError:  # written by a newer version, or by hand
        return default_args()
    return values


def _known(name: str, saved: Mapping[str, Any] | None) -> str:
    """A preset of the user's own means nothing to others: its fields are written out."""
    return CUSTOM if saved and name in saved else name


def _preset_of(text: str) -> str:
    try:
        return preset_name(text)
    except ValueError:
        return CUSTOM


def _entries(preset: str, config: MergeConfig | None, prefix: str) -> dict[str, str]:
    if config is None:
        return {}
    base = preset_config(preset) if preset != OFF else None
    base = base or MergeConfig()
    return {
        prefix + field.name.replace("_", " "): field.text(config)
        for field in FIELDS
        if getattr(config, field.name) != getattr(base, field.name)
    }


def _told(preset: str, params: Mapping[str, Any], prefix: str) -> tuple[str, MergeConfig | None]:
    """A pass's preset, as it is called today, and its configuration."""
    name = _preset_of(preset)
    config = preset_config(name)
    if EDITION_KEY not in params and name in FIRST_EDITION:
        name, config = CUSTOM, FIRST_EDITION[name]
    if config is None:
        return name, None
    told = {}
    for field in FIELDS:
        key = prefix + field.name.replace("_", " ")
        if key in params:
            with suppress(ValueError):  # written by a newer version, or by hand: the others still hold
                told[field.name] = field.read(params[key])
    try:
        return name, config.with_(**told)
    except ValueError:  # not without what was left out: as many of them as can be
        for field_name, value in told.items():
            with suppress(ValueError):
                config = config.with_(**{field_name: value})
        return name, config
