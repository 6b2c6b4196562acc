"""A file that is saved is whole, or as it was: what is stopped in between, or finds no room, leaves nothing torn."""

from __future__ import annotations

import os
from pathlib import Path


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
