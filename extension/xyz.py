"""X/Y/Z axes: one for the preset and one for each field of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modules import scripts

from .fields import CUSTOM, FIELDS, OFF, PRESETS, TITLE, Field
from .request import preset_name
from .run import AXES

PREFIX = f"[{TITLE}] "


def add_axes(own: Callable[[], Mapping[str, Any]]) -> None:
    """``on_before_ui``. The grid is executed anew when the UI is reloaded; doubles are left out all the same.

    Args:
        own: the user's presets by name, asked for when a grid is.
    """
    found = [s.module for s in scripts.scripts_data if s.script_class.__module__ in ("xyz_grid.py", "scripts.xyz_grid")]
    if not found or any(option.label.startswith(PREFIX) for option in found[0].axis_options):
        return
    grid = found[0]
    preset = grid.AxisOption(
        f"{PREFIX}Preset",
        str,
        _apply("preset"),
        confirm=_confirm_preset(own),
        choices=lambda: [OFF, *PRESETS, CUSTOM, *own()],
    )
    grid.axis_options.extend([preset, *(_axis(grid, field) for field in FIELDS)])


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


def _confirm_preset(own: Callable[[], Mapping[str, Any]]) -> Callable[[Any, Sequence[Any]], None]:
    def confirm(p: Any, values: Sequence[Any]) -> None:
        saved = own()
        for value in values:
            preset_name(value, saved)

    return confirm
