"""The size gate: from how many tokens merging a layer pays, so that no run is slower for it.

What merging saves grows with the square of a sequence's length, and what it costs hardly at all: below some length a
layer is better left alone. Where that is was measured (``tome-sampler bench --calibrate``), for the machine that the
table names; a calibration of your own takes the place of the rows of its device, kernel and precision.
"""

from __future__ import annotations

import json
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from tome_sampler.saving import write_whole

BUILT_IN = Path(__file__).with_name("gate.json")
UNMEASURED = {"cuda": 2048}
"""Tokens, for devices that the table does not have. Not measured: 4096 tokens are what fused attention on a GPU is
known to gain from, and a quarter of that is a sixteenth of the gain."""
OTHERS = 1024

CALLS = 3
"""Model calls that a match must serve for the table's "kept": the default makes six in a run of 20 steps."""

ALONE = {"ff": (1024, 36864), "attn2": (1024, 9216)}
"""Tokens between which a feed-forward, or cross-attention, pays that is merged without the self-attention beside it."""
ALONE_CHANNELS = 320  # and more

_STANDARD = 1 - (1 - 0.5) ** 2  # of a layer's attention scores, what the ratio saves that the table is made at


def own_table() -> Path:
    """Where a calibration of this machine lies, whether or not there is one."""
    # not Path.home(), which raises where there is none
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "tome-sampler" / "gate.json"


def backend_of(device: str) -> str:
    """Which of torch's attention kernels a device takes first: "flash", "efficient" or "math"; elsewhere "auto"."""
    if device != "cuda":
        return "auto"
    kernels = torch.backends.cuda
    if kernels.flash_sdp_enabled():
        return "flash"
    return "efficient" if kernels.mem_efficient_sdp_enabled() else "math"


def least_tokens(channels: int, dtype: torch.dtype, device: str, ratio: float, always: bool) -> int:
    """The shortest sequence that is merged at a ratio > 0.

    Args:
        channels: width of the layer's tokens. device: a torch device type.
        always: pairs are made in every call, or nearly, so that nothing pays for the match but the call itself.
    """
    at_half = _at_half(channels, str(dtype).removeprefix("torch."), device, backend_of(device), always)
    # savings go with n * n * (1 - (1 - ratio)^2) and costs with n, so where they meet goes with the inverse
    saved = max(1 - (1 - min(ratio, 1.0)) ** 2, 1e-6)
    return math.ceil(at_half * max(_STANDARD / saved, 1.0))


def pays_alone(part: str, n: int, channels: int, device: str, ratio: float, always: bool) -> bool:
    """Whether to merge n tokens for a part of a block, "ff" or "attn2", that has to pay for its match by itself.

    It saves the same share at any length, and a match costs more the longer a sequence is: too long ones do not pay
    either. Nor do narrow layers, nor a match in each call. Other devices than a CPU were not measured.
    """
    shortest, longest = ALONE[part]
    less = max(min(ratio, 0.5) / 0.5, 1e-6)
    measured = device == "cpu" and channels >= ALONE_CHANNELS and not always
    return measured and shortest / less <= n <= longest * less


def computed_in(dtype: torch.dtype, device: str) -> torch.dtype:
    """The precision that a layer's attention computes in whose tokens are of `dtype`: under autocast (AUTOMATIC1111's
    default on CUDA) a norm gives fp32, and the layers after it take less."""
    if dtype == torch.float64:  # which it lets be
        return dtype
    if hasattr(torch, "get_autocast_dtype"):  # torch 2.4 and later
        under = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if under else dtype
    if device == "cpu":
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else dtype
    return torch.get_autocast_gpu_dtype() if device == "cuda" and torch.is_autocast_enabled() else dtype


@lru_cache(maxsize=256)
def _at_half(channels: int, dtype: str, device: str, backend: str, always: bool) -> int:
    rows = [row for row in _table() if row["device"] == device]
    for key, value in (("backend", backend), ("dtype", dtype)):  # what is not in it is taken to be like the rest
        rows = [row for row in rows if row[key] == value] or rows
    if not rows:
        return UNMEASURED.get(device, OTHERS)
    nearest = min(abs(math.log(row["channels"] / channels)) for row in rows)
    alike = [row for row in rows if abs(math.log(row["channels"] / channels)) == nearest]
    return max(int(row["always" if always else "kept"]) for row in alike)


@lru_cache(maxsize=1)
def _table() -> list[dict[str, Any]]:
    """Rows: device, backend, dtype, channels; kept and always: tokens from which merging pays. The machine's own, and
    built-in ones of the kinds that it was not calibrated for."""
    return _joined(_rows_of(BUILT_IN), _rows_of(own_table()))


def _joined(older: list[dict[str, Any]], newer: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newer rows, and the older ones of other kinds."""
    kinds = {_kind(row) for row in newer}
    return [row for row in older if _kind(row) not in kinds] + newer


def _rows_of(path: Path) -> list[dict[str, Any]]:
    """A table's rows; none where there is no table, or one that is not ours."""
    try:
        rows = json.loads(path.read_text())["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [row for row in rows if _is_row(row)] if isinstance(rows, list) else []


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("device", "backend", "dtype")):
        return False
    return all(isinstance(row.get(key), int) and row[key] > 0 for key in ("channels", "kept", "always"))


def write_table(path: Path, machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Save a calibration; it counts from now on. Rows of devices, kernels and precisions that it does not have stay.

    Raises:
        OSError: it cannot be written; the old one is as it was.
    """
    rows = _joined(_rows_of(path), rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n").encode())
    forget()


def forget() -> None:
    """Read the tables anew when they are next asked for."""
    _table.cache_clear()
    _at_half.cache_clear()


def _kind(row: dict[str, Any]) -> tuple[str, ...]:
    return row["device"], row["backend"], row["dtype"]
