"""One process, or several under ``accelerate launch``: who does what, and how all get to know."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_PATIENCE = timedelta(days=30)


class Processes:
    """This process among those of a launch. number: from 0. count: of all of them.

    Args:
        device: the one that was asked for, or None: each process its own.

    Raises:
        ImportError: several were launched, and accelerate is not installed.
    """

    def __init__(self, device: str | None = None) -> None:
        self.device = device or "cpu"
        self.number, self.count = 0, 1
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            try:
                from accelerate import PartialState
            except ImportError as error:
                raise ImportError(f"several processes need accelerate, which cannot be imported ({error})") from None
            # without a GPU it would take each process for the only one. One that is done waits for the slowest, which
            # by default is given up after half an hour
            cpu = device == "cpu" or not torch.cuda.is_available()
            self._state = PartialState(cpu=cpu, timeout=_PATIENCE)
            self.number, self.count = self._state.process_index, self._state.num_processes
            self.device = device or str(self._state.device)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes what all have found."""
        return self.number == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """The items that are this process's."""
        return list(items[self.number :: self.count])

    def gather(self, items: list[T]) -> list[T]:
        """The items of all processes, in each of them."""
        if self._state is None:
            return items
        from accelerate.utils import gather_object

        return list(gather_object(items))

    def wait(self) -> None:
        """Until all have come here."""
        if self._state is not None:
            self._state.wait_for_everyone()
