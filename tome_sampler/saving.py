"""A file that is saved is whole, or as it was: what is stopped in between, or finds no room, leaves nothing torn."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def require_place(option: str, path: Path) -> None:
    """What is to be saved at the end is refused at the beginning if it could not be.

    Raises:
        ValueError: no file can be written there; one line that names the option, the path and why.
    """
    why = None
    if path.exists() and not path.is_file():
        why = "it is a folder" if path.is_dir() else "it is no regular file"
    elif not path.parent.is_dir():
        why = f"there is no folder {path.parent}"
    else:
        try:
            tempfile.TemporaryFile(dir=path.parent).close()  # permissions alone do not say it, least of all to root
        except OSError as error:
            why = f"nothing can be written into {path.parent} ({error.strerror})"
    if why is not None:
        raise ValueError(f"{option} is {str(path)!r}; it cannot be written: {why}")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is either whole or not there (or as it was).

    Raises:
        OSError: it could not be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written ({error.strerror})") from None
