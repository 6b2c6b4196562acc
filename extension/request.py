"""What a run was asked for: from the page's controls or a caller's arguments to configurations, or a readable error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tome_sampler.config import MergeConfig

from .fields import BY_NAME, CUSTOM, FIELDS, HIRES, OFF, PRESETS

SAME = "Same"
DEFAULT = "Balanced"
KEYS = ("enabled", "preset", *BY_NAME, "hires")


@dataclass(frozen=True)
class Request:
    """config: for the first pass, None: off. hires: for the second pass, None: off. same: hires is the first pass's.
    preset, hires_preset: the names the configurations started from. shown: what the page's controls say of the first
    pass, switched on or not."""

    preset: str
    config: MergeConfig | None
    same: bool = True
    hires_preset: str = SAME
    hires: MergeConfig | None = None
    shown: MergeConfig | None = dataclasses.field(default=None, compare=False)

    def of_pass(self, is_hires: bool) -> MergeConfig | None:
        """The configuration of a sampling pass, None: do not merge."""
        return self.hires if is_hires and not self.same else self.config

    @property
    def on(self) -> bool:
        """Whether any pass merges."""
        return self.config is not None or (not self.same and self.hires is not None)

    def with_fields(self, values: Mapping[str, Any], saved: Mapping[str, Mapping[str, Any]] | None = None) -> Request:
        """With some fields of the first pass, or its preset, replaced: what an axis of a grid does. Fields turn on
        what was off, unless it is the axis that says Off: that is the grid's plain column. Custom is what the page
        holds. saved: the user's own presets.

        Raises:
            ValueError: a name or a value is not known.
        """
        preset, config, held = self.preset, self.config, self.config or self.shown or MergeConfig()
        if "preset" in values:
            preset = preset_name(values["preset"], saved)
            config = held if preset == CUSTOM else preset_config(preset, saved)
        rest = {name: value for name, value in values.items() if name != "preset"}
        if rest and not ("preset" in values and config is None):
            preset = CUSTOM if config is None else preset
            config = _with(config or held, rest)
        return replace(self, preset=preset, config=config)

    def of_at_least(self, tokens: int) -> Request:
        """With layers of fewer tokens left alone, instead of those that "auto" leaves alone; 0: as it is."""

        def gated(config: MergeConfig | None) -> MergeConfig | None:
            if config is None or not tokens:
                return config
            own = config.min_tokens
            return config.with_(min_tokens=tokens if own == "auto" else max(own, tokens))

        return replace(self, config=gated(self.config), hires=gated(self.hires))


DISABLED = Request(OFF, None)


def preset_name(value: Any, saved: Mapping[str, Any] | None = None) -> str:
    """A preset as the page names it, from that name or the library's, in any case.

    Raises:
        ValueError: there is none such.
    """
    names = (OFF, *PRESETS, CUSTOM, *(saved or {}))
    known = {name.lower(): name for name in names}
    known |= {library: name for name, library in PRESETS.items()} | {"default": "Balanced"}
    if not isinstance(value, str) or value.strip().lower() not in known:
        raise ValueError(f"preset is {value!r}; it must be one of {', '.join(names)}")
    if value.strip() in names:  # files of before that was refused may have two that differ in case
        return value.strip()
    return known[value.strip().lower()]


def preset_config(name: str, saved: Mapping[str, Mapping[str, Any]] | None = None) -> MergeConfig | None:
    """What a preset, as the page names it, stands for; None: off. Custom starts from the default."""
    if name == OFF:
        return None
    if saved and name in saved:
        return MergeConfig.from_dict(saved[name])
    return MergeConfig.preset(PRESETS.get(name, "default"))


def read_args(
    args: Sequence[Any], saved: Mapping[str, Mapping[str, Any]] | None = None, default: str = DEFAULT
) -> Request:
    """A request from script arguments: one dict, or the page's controls in order (the rest takes defaults).

    Controls that say something else than their preset were set by hand: they count, and the preset is Custom.

    Args:
        saved: the user's own presets. default: the preset of who names none.

    Raises:
        ValueError: a key is unknown, or a value is of the wrong type or out of range; one line that names it.
    """
    if args and isinstance(args[0], Mapping):
        return read_dict(args[0], saved, default)
    defaults = default_args(default)
    if len(args) > len(defaults):
        raise ValueError(f"there are {len(args)} arguments; at most {len(defaults)} are known")
    values = [default if value is None else value for value, default in zip(args, defaults, strict=False)]
    values += defaults[len(values) :]
    enabled, name = _flag("enabled", values[0]), preset_name(values[1], saved)
    controls, own = values[2 : 2 + len(FIELDS)], values[2 + len(FIELDS) :]
    config = preset_config(name, saved)
    if config is not None:
        fields = {f.name: f.read(value) for f, value in zip(FIELDS, controls, strict=True)}
        if name == CUSTOM or not _as_they_come(controls):
            chosen = _with(MergeConfig(), fields)
            if any(f.shown(chosen) != f.shown(config) for f in FIELDS):
                name, config = CUSTOM, chosen
    override, hires_name = _flag("hires", own[0]), preset_name(own[1], saved)
    if not enabled:
        return Request(OFF, None, shown=config)
    if not override:
        return Request(name, config, shown=config)
    hires = preset_config(hires_name, saved)
    if hires is not None and (hires_name == CUSTOM or own[2:] != defaults[4 + len(FIELDS) :]):
        *values, others = own[2:]
        said = {**dict(zip(HIRES, values, strict=True)), **_spelt(others)}
        if hires_name == CUSTOM or any(BY_NAME[f].shown(_with(hires, said)) != BY_NAME[f].shown(hires) for f in said):
            hires_name, hires = CUSTOM, _with(config or MergeConfig(), said)
    return Request(name, config, False, hires_name, hires, shown=config)


def hires_controls(config: MergeConfig, first: MergeConfig | None) -> list[Any]:
    """What the hires override's controls show of a configuration: the fields that have one, and in words whatever
    else is not as in the first pass."""
    shown = {name: BY_NAME[name].shown(config) for name in HIRES}
    held = _with(first or MergeConfig(), shown)
    others = [f"{f.name}={f.text(config)}" for f in FIELDS if getattr(config, f.name) != getattr(held, f.name)]
    return [*shown.values(), ", ".join(others)]


def read_dict(
    data: Mapping[str, Any], saved: Mapping[str, Mapping[str, Any]] | None = None, default: str = DEFAULT
) -> Request:
    """A request from a caller's dict: ``{"enabled": true, "preset": "balanced", "ratio": 0.5, "hires": {...}}``.

    Fields replace the preset's. hires is such a dict without enabled and hires; its fields replace those of its preset
    or, without one, of the first pass. Missing keys take defaults; enabled is then true.
    """
    for key in data:
        if key not in KEYS:
            raise ValueError(f"there is no argument {key!r}; there are {', '.join(KEYS)}")
    if not _flag("enabled", data.get("enabled", True)):
        return DISABLED
    name, config = _section(data, saved, default, None)
    hires = data.get("hires")
    if hires is None:
        return Request(name, config)
    if isinstance(hires, str):
        hires = {"preset": hires}
    if not isinstance(hires, Mapping):
        raise ValueError(f"hires is {hires!r}; it must be an object with a preset or fields, or null")
    for key in hires:
        if key not in KEYS or key in ("enabled", "hires"):
            raise ValueError(f"hires has no argument {key!r}; it has {', '.join(('preset', *BY_NAME))}")
    hires_name, second = _section(hires, saved, CUSTOM, config)
    return Request(name, config, False, hires_name, second)


def default_args(preset: str = DEFAULT) -> list[Any]:
    """The page's controls in order, as they come: enabled, preset, the table's fields, then the hires override."""
    config = preset_config(preset) or MergeConfig()
    hires = [BY_NAME[name].shown(MergeConfig.preset("fast")) for name in HIRES]
    return [False, preset, *(field.shown(config) for field in FIELDS), False, "Fast", *hires, ""]


def _as_they_come(controls: Sequence[Any]) -> bool:
    """Whether nobody has set the first pass's controls. Hosts fill a caller's arguments from the controls as they were
    built once, with a preset that is the setting's no more, or another one for img2img."""
    return any(list(controls) == default_args(preset)[2 : 2 + len(FIELDS)] for preset in PRESETS)


def schema() -> dict[str, Any]:
    """JSON schema of a caller's dict."""
    kinds: dict[str, dict[str, Any]] = {}
    for field in FIELDS:
        if field.kind in ("number", "whole"):
            entry: dict[str, Any] = {"type": "number" if field.kind == "number" else "integer"}
            entry |= {"minimum": field.low, "maximum": field.high}
        elif field.kind == "threshold":
            entry = {"type": ["number", "null"], "minimum": -1, "maximum": 1}
        elif field.kind == "optional":
            entry = {"type": ["number", "null"], "minimum": field.low, "maximum": field.high}
        elif field.kind == "tokens":
            integers = {"type": "integer", "minimum": field.low, "maximum": field.high}
            entry = {"anyOf": [integers, {"const": "auto"}]}
        elif field.kind == "flag":
            entry = {"type": "boolean"}
        elif field.kind == "choice":
            entry = {"type": "string", "enum": list(field.choices)}
        elif field.kind == "choices":
            entry = {"type": "array", "items": {"enum": list(field.choices)}, "minItems": 1}
        elif field.kind == "optional choices":
            entry = {"type": ["array", "null"], "items": {"enum": list(field.choices)}}
        else:
            entry = {"type": ["string", "object"], "examples": list(field.choices)}
        default = MergeConfig().to_dict()[field.name]
        kinds[field.name] = {**entry, "title": field.label, "description": field.info, "default": default}
    preset = {"type": "string", "examples": [OFF, *PRESETS, CUSTOM]}
    hires = {"type": "object", "additionalProperties": False, "properties": {"preset": preset, **kinds}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "enabled": {"type": "boolean", "default": True},
            "preset": {**preset, "default": "Balanced"},
            **kinds,
            "hires": {"anyOf": [hires, {"type": "string"}, {"type": "null"}]},
        },
    }


def _section(
    data: Mapping[str, Any], saved: Mapping[str, Mapping[str, Any]] | None, default: str, base: MergeConfig | None
) -> tuple[str, MergeConfig | None]:
    given = data.get("preset")
    name = default if given is None else preset_name(given, saved)
    config = preset_config(name, saved)
    if given is None and base is not None:
        config = base
    fields = {
        key: value for key, value in data.items() if key in BY_NAME and (value is not None or BY_NAME[key].nullable)
    }
    if fields and config is not None:
        config = _with(config, fields)
    return name, config


def _with(config: MergeConfig, values: Mapping[str, Any]) -> MergeConfig:
    for name in values:
        if name not in BY_NAME:
            raise ValueError(f"there is no field {name!r}; there are {', '.join(BY_NAME)}")
    read = {name: BY_NAME[name].read(value) for name, value in values.items()}
    return config.with_(**read)


def _spelt(text: Any) -> dict[str, str]:
    """ "refresh=always, start=0.1" as fields and their values, still as text."""
    if not isinstance(text, str):
        raise ValueError(f"hires_others is {text!r}; it must be text like 'refresh=always, start=0.1'")
    values = {}
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = (part.strip() for part in piece.partition("="))
        if not (name and equals and value):
            raise ValueError(f"hires_others has {piece!r}; it must be field=value")
        values[name] = value
    return values


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be true or false")
    return value
