"""Results as JSON lines: a row a picture, appended as they come, so that a run that was killed goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tome_sampler.config import MergeConfig
from tome_sampler.eval.methods import Method
from tome_sampler.saving import write_whole

Row = dict[str, Any]
Key = tuple[str, str, str, int]
_NEEDED = ("method", "setting", "prompt", "seed", "run", "unet_seconds", "psnr")


def key_of(row: Row) -> Key:
    """What a row is known by: method, setting, prompt, seed."""
    return row["method"], row["setting"], row["prompt"], row["seed"]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; none if there is no file. A last line that was torn by a kill is left out.

    Raises:
        ValueError: another line is no row. OSError: it cannot be read.
    """
    if not path.exists():
        return []
    if not path.is_file():
        raise ValueError(f"{path} is no regular file; results that a run can go on from need one")
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):  # no line feed at its end: it was being written
                break
            raise ValueError(f"{path}, line {number}, is not JSON; the file is damaged, or no file of eval") from None
        if not isinstance(row, dict) or any(name not in row for name in _NEEDED):
            raise ValueError(f"{path}, line {number}, is no row of tome-sampler eval; give another --json file")
        rows.append(row)
    return rows


def check_rows(rows: Iterable[Row], run: Row, methods: Sequence[Method], path: Path) -> None:
    """
    Raises:
        ValueError: rows were made with other settings than `run`, or a method's preset meant something else then.
    """
    configs = {(m.name, m.setting): m.config for m in methods}
    for row in rows:
        for name in run.keys() | row["run"].keys():
            was, now = row["run"].get(name), run.get(name)
            if was != now:
                raise ValueError(
                    f"{path} has pictures with {name} {was!r}, and now it is {now!r}; to go on, give the same options, "
                    "and to start anew, another file"
                )
        config = configs.get((row["method"], row["setting"]))
        if config is not None and MergeConfig.from_dict(row["config"]) != config:
            raise ValueError(
                f"{path} has pictures of {row['method']} when that preset meant other settings; give another file, or "
                "the settings of then after a colon"
            )


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Add rows at the end of a file, all or none of them.

    Raises:
        OSError: they could not be written (a full disk); the file is as it was before.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        before = os.fstat(file).st_size
        try:
            written = 0
            while written < len(text):
                written += os.write(file, text[written:])
            os.fsync(file)
        except OSError as error:
            os.ftruncate(file, before)
            raise OSError(
                f"{path} cannot be written ({error.strerror}); what is in it is whole: the same command goes on from "
                "there"
            ) from None
    finally:
        os.close(file)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """A whole file of rows, instead of what is there."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
