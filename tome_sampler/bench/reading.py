"""What was measured before, from its JSON files: hours of measuring need not be gone through again for a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tome_sampler.spelling import split_methods

_OF_A_ROW = ("method", "arch", "size", "batch", "kind", "seconds", "speedup")


def read(files: str, methods: str | None) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The machine and the rows of each file, in their order.

    Args:
        files: as the command line names them, with commas between them. methods: those whose rows are wanted, with all
            kinds of their steps, in this order; None: all.

    Raises:
        ValueError: a file cannot be read, is not of this command, or none of them has one of the methods.
    """
    found = [_file(Path(name)) for name in files.split(",")]
    if methods is None:
        return found
    wanted = split_methods(methods)
    known = {_base(row) for _, rows in found for row in rows}
    for name in wanted:
        if name not in known:
            raise ValueError(f"method is {name!r}; in {files} it must be one of {', '.join(sorted(known))}")
    return [(machine, [row for name in wanted for row in rows if _base(row) == name]) for machine, rows in found]


def _base(row: dict[str, Any]) -> str:
    """A row's method, without the kind of step."""
    return str(row["method"]).partition("/")[0]


def _file(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise ValueError(f"read is {str(path)!r}; it cannot be read: {reason}") from error
    try:
        machine, rows = content["machine"], content["results"]
        complete = bool(rows) and all(key in row for row in rows for key in _OF_A_ROW) and "load" in machine
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise ValueError(f"read is {str(path)!r}; it must be a file that tome-sampler bench --json has written")
    return machine, rows
