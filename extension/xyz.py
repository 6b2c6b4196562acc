"""X/Y/Z axes: one for the preset and one for each field of the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from modules import scripts

from .fields import CUSTOM, FIELDS, OFF, PRESETS, TITLE, Field
from .request import preset_name
from .run import AXES

PREFIX = f"[{TITLE}] "


def add_axes() -> None:
    """``on_before_ui``. The grid is executed anew when the UI is reloaded; doubles are left out all the same."""
    found = [s.module for s in scripts.scripts_data if s.script_class.__module__ in ("xyz_grid.py", "scripts.xyz_grid")]
    if not found or any(option.label.startswith(PREFIX) for option in found[0].axis_options):
        return
    grid = found[0]
    presets = [OFF, *PRESETS, CUSTOM]
    axes = [grid.AxisOption(f"{PREFIX}Preset", str, _apply("preset"), confirm=_confirm_preset, choices=lambda: presets)]
    axes += [_axis(grid, field) for field in FIELDS]
    grid.axis_options.extend(axes)


def _axis(grid: Any, field: Field) -> Any:
    # whole numbers as int, so that the grid's ranges (1-4) work; what has words besides numbers as text
    kinds: dict[str, type] = {"number": float, "whole": int}
    choices: tuple[str, ...] = ("True", "False") if field.kind == "flag" else field.choices
    more = {"choices": lambda: list(choices)} if choices else {}
    return grid.AxisOption(
        PREFIX + field.label,
        kinds.get(field.kind, str),
        _apply(field.name),
        confirm=_confirm(field),
        **more,
    )


def _apply(name: str) -> Callable[[Any, Any, Any], None]:
    def apply(p: Any, value: Any, values: Any) -> None:
        # a new dict: the cells are shallow copies of one p
        setattr(p, AXES, {**getattr(p, AXES, {}), name: value})

    return apply


def _confirm(field: Field) -> Callable[[Any, Sequence[Any]], None]:
    def confirm(p: Any, values: Sequence[Any]) -> None:
        for value in values:
            field.read(value)

    return confirm


def _confirm_preset(p: Any, values: Sequence[Any]) -> None:
    for value in values:
        preset_name(value)
