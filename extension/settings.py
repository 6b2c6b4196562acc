"""The settings page: defaults and what is not of a single picture. ``override_settings`` reaches all of it."""

from __future__ import annotations

import logging
from typing import Any

import gradio as gr
from modules import shared

from .fields import BY_NAME, PRESETS, TITLE
from .request import DEFAULT

SECTION = ("tome_sampler", TITLE)
LEVELS = ("Debug", "Info", "Warning", "Error")


def add_options() -> None:
    """``on_ui_settings``."""
    info = shared.OptionInfo
    options = {
        "tome_sampler_preset": info(
            DEFAULT, "Preset that the accordion starts with", gr.Dropdown, {"choices": list(PRESETS)}
        ).info("and that API callers get who name none; the accordion follows after Reload UI"),
        "tome_sampler_min_tokens": info(
            0, "Leave layers with fewer tokens alone", gr.Slider, {"minimum": 0, "maximum": 16384, "step": 256}
        ).info(
            "0: as the accordion says, which by default leaves those alone where merging would not pay on this kind of "
            "device. 4096 tokens are the finest layer of SD 1.5 at 512x512"
        ),
        "tome_sampler_keep_maps": info(True, "Keep the last run's importance and merge maps").info(
            "for the tab and the API; a few kilobytes a step, only in memory"
        ),
        "tome_sampler_save_overlays": info(False, "Save the last maps beside the first picture of each batch").info(
            "as <picture>-tome-importance.png and <picture>-tome-groups.png"
        ),
        "tome_sampler_log_level": info("Warning", "Log level", gr.Radio, {"choices": list(LEVELS)}),
    }
    for name, option in options.items():
        option.section = SECTION
        shared.opts.add_option(name, option)


def value(name: str, default: Any) -> Any:
    """A setting; the default where a host has not loaded them yet."""
    return shared.opts.data.get(f"tome_sampler_{name}", default)


def default_preset() -> str:
    """The preset of who names none; an override that is no preset counts as none."""
    found = value("preset", DEFAULT)
    return found if found in PRESETS else DEFAULT


def least_tokens() -> int:
    """The size gate, at most what the control can hold; 0 if what an override put there is no number."""
    found = value("min_tokens", 0)
    number = isinstance(found, (int, float)) and not isinstance(found, bool) and found > 0
    return int(min(found, BY_NAME["min_tokens"].high)) if number else 0


def apply_log_level() -> None:
    """At the start of each run, so that an override counts."""
    level = str(value("log_level", "Warning")).upper()
    logging.getLogger("tome_sampler").setLevel(getattr(logging, level, logging.WARNING))
