"""Profiles: settings that were found for a model, and what they were found from, in a JSON file.

``tome-sampler inspect --tune`` writes them; ``generate --profile``, :func:`read_profile` and whoever reads ``config``,
the plain data of ``MergeConfig.to_dict``, take them back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tome_sampler.config import MergeConfig
from tome_sampler.saving import write_whole

FORMAT = "tome-sampler profile 1"


def write_profile(path: Path, config: MergeConfig, *, model: str, measured: Mapping[str, Any]) -> None:
    """Save settings for a model, with the figures that they rest on."""
    data = {"format": FORMAT, "model": model, "config": config.to_dict(), "measured": dict(measured)}
    write_whole(path, (json.dumps(data, indent=2) + "\n").encode())


def read_profile(path: Path | str) -> MergeConfig:
    """The settings of a profile.

    Raises:
        ValueError: the file is missing, is no profile, or holds a setting that is unknown or out of range.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no profile {path}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a profile: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("config"), dict):
        raise ValueError(f'{path} is no profile: it must say "format": "{FORMAT}" and have a "config"')
    return MergeConfig.from_dict({"early_ratio": None, **data["config"]})  # one from before there was such a part
