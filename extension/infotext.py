"""What a picture's parameters say of the merging, and back: the preset's name, and what differs from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tome_sampler.config import MergeConfig

from .fields import BY_NAME, CUSTOM, FIELDS, HIRES, OFF, TITLE
from .request import Request, default_args, preset_config, preset_name, read_args

KEY = TITLE
HIRES_KEY = "ToMe hires"
ASIDE = "stood aside"


def written(request: Request, saved: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, str]:
    """The infotext's entries of a request; none when it is off."""
    if not request.on:
        return {}
    entries = {KEY: _known(request.preset, saved)} | _entries(request.preset, request.config, "ToMe ")
    if not request.same:
        entries |= {HIRES_KEY: _known(request.hires_preset, saved)}
        entries |= _entries(request.hires_preset, request.hires, "ToMe hires ")
    return entries


def stood_aside(reason: str) -> dict[str, str]:
    """The entries of a run that was asked to merge and did not."""
    return {KEY: f"{ASIDE}: {reason}"}


def control_values(params: Mapping[str, Any]) -> list[Any]:
    """The page's controls in order, as an infotext's entries set them; off when it says nothing of merging."""
    values = default_args()
    told = params.get(KEY)
    if not isinstance(told, str) or told.startswith(ASIDE):
        return values
    name = _preset_of(told)
    config = _config_of(name, params, "ToMe ")
    values[0], values[1] = True, name
    if config is not None:
        values[2 : 2 + len(FIELDS)] = [field.shown(config) for field in FIELDS]
    if isinstance(params.get(HIRES_KEY), str):
        hires_name = _preset_of(params[HIRES_KEY])
        hires = _config_of(hires_name, params, "ToMe hires ")
        if hires is not None and hires != preset_config(hires_name):
            hires_name = CUSTOM
        shown = hires or MergeConfig()
        values[2 + len(FIELDS) :] = [
            True,
            hires_name,
            *(BY_NAME[f].shown(shown) for f in HIRES),
        ]
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


def _config_of(name: str, params: Mapping[str, Any], prefix: str) -> MergeConfig | None:
    config = preset_config(name)
    told = {f.name: params[key] for f in FIELDS if (key := prefix + f.name.replace("_", " ")) in params}
    if config is None or not told:
        return config
    try:
        return config.with_(**{name: BY_NAME[name].read(value) for name, value in told.items()})
    except ValueError:
        return config
