"""Settings as people write them: "sigma ratio 6", "fast:ratio=0.7,refresh=always"."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from tome_sampler.config import MergeConfig
from tome_sampler.refresh import (
    CA_TOME_CHECKPOINTS,
    Always,
    Checkpoints,
    Drift,
    EverySteps,
    Once,
    Refresh,
    SigmaRatio,
    refresh_from_dict,
)


def refresh_text(refresh: Refresh) -> str:
    """A policy as a few words; :func:`read_refresh` takes them back."""
    if isinstance(refresh, SigmaRatio):
        return f"sigma ratio {_number(refresh.ratio)}"
    if isinstance(refresh, EverySteps):
        return f"every {refresh.steps} steps"
    if isinstance(refresh, Drift):
        return f"drift {_number(refresh.tolerance)}"
    if isinstance(refresh, Checkpoints):
        names = [name for name, published in CA_TOME_CHECKPOINTS.items() if published == refresh]
        return "checkpoints " + (names[0] if names else " ".join(_number(f) for f in refresh.fractions))
    return refresh.kind


def _number(value: float) -> str:
    """As short as can be read back to the same one."""
    return repr(float(value)).removesuffix(".0")


def read_refresh(value: Any) -> Refresh:
    """A policy from its words, or from the plain data of ``Refresh.to_dict``. A command line may write "sigma_6" for
    "sigma ratio 6" and "steps_5" for "every 5 steps".

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, Refresh):
        return value
    if isinstance(value, Mapping):
        return refresh_from_dict(value)
    words = value.lower().split() if isinstance(value, str) else []
    if len(words) == 1 and not words[0].startswith("checkpoints"):  # the names of CA-ToMe's lists have such lines too
        words = words[0].split("_")
    kind, *rest = words or [""]
    try:
        if kind in ("always", "once") and not rest:
            return Always() if kind == "always" else Once()
        if kind == "sigma" and len(rest) - (rest[:1] == ["ratio"]) == 1:
            return SigmaRatio(float(rest[-1]))
        if kind == "every" and rest[1:] in ([], ["step"], ["steps"]):
            return EverySteps(int(rest[0]))
        if kind == "steps" and len(rest) == 1:
            return EverySteps(int(rest[0]))
        if kind == "drift" and len(rest) == 1:
            return Drift(float(rest[0]))
        if kind == "checkpoints":
            return CA_TOME_CHECKPOINTS.get(" ".join(rest)) or Checkpoints(tuple(float(word) for word in rest))
    except (ValueError, IndexError, OverflowError) as error:
        raise ValueError(f"refresh is {value!r}: {error}") from None
    raise ValueError(
        f"refresh is {value!r}; it must be 'always', 'once', 'sigma ratio 2', 'every 5 steps', 'drift 0.05' or "
        f"'checkpoints' with a list's name ({', '.join(CA_TOME_CHECKPOINTS)}) or fractions from 0 to 1"
    )


_WORDS = {"true": True, "false": False, "none": None}


def read_value(field: str, text: str) -> Any:
    """A setting's value: what Python would read, else the text. Refresh policies have their words, modules a plus
    between them; true, false and none may be written small."""
    if field == "refresh":
        return read_refresh(text)
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if field in ("modules", "early_modules"):
        return tuple(text.split("+"))
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def read_overrides(text: str) -> dict[str, Any]:
    """ "ratio=0.7,refresh=sigma ratio 4" as fields and their values.

    Raises:
        ValueError: a piece is not field=value, or a policy is unknown.
    """
    values = {}
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        field, equals, value = piece.partition("=")
        if not (equals and field and value):
            raise ValueError(f"override is {piece!r}; it must be field=value")
        values[field] = read_value(field, value)
    return values


def split_methods(text: str) -> list[str]:
    """ "tomesd,default:ratio=0.7,stride=4" as its methods: a "field=value" on its own belongs to the one before it."""
    labels: list[str] = []
    for piece in (piece.strip() for piece in text.split(",")):
        if labels and "=" in piece and ":" not in piece:
            labels[-1] += f",{piece}"
        else:
            labels.append(piece)
    return labels


def read_config(text: str, common: Mapping[str, Any] | None = None) -> MergeConfig:
    """ "PRESET" or "PRESET:field=value,...", on top of what `common` sets for every preset.

    Raises:
        ValueError: a name, a field or a value is unknown or out of range.
    """
    name, _, overrides = text.partition(":")
    return MergeConfig.preset(name, **{**(common or {}), **read_overrides(overrides)})
