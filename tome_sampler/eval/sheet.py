"""Best, median and worst cases as pictures. They are drawn again, from the same seeds."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tome_sampler.eval.measure import Plan
from tome_sampler.eval.methods import OURS, Method
from tome_sampler.eval.prompts import Case
from tome_sampler.eval.rows import Row
from tome_sampler.overlay import to_bytes

_PANEL = 192
_MARGIN = 10
_INK, _PAPER = (30, 30, 34), (250, 250, 248)
_MOST = 6  # methods beside plain


def shown(methods: Sequence[Method]) -> list[Method]:
    """The methods that a sheet has room for: of each name its middle setting, as they were given."""
    by_name: dict[str, list[Method]] = {}
    for method in methods:
        if method.name != "plain":
            by_name.setdefault(method.name, []).append(method)
    return [those[len(those) // 2] for those in by_name.values()][:_MOST]


def chosen(methods: Sequence[Method], rows: Sequence[Row]) -> tuple[Method, list[tuple[str, Row]]] | None:
    """Of the first method of ours (or else the first): its best, median and worst picture, by PSNR."""
    candidates = shown(methods)
    if not candidates:
        return None
    method = next((m for m in candidates if m.name in OURS), candidates[0])
    found = sorted(
        (row for row in rows if (row["method"], row["setting"]) == (method.name, method.setting)),
        key=lambda row: row["psnr"],
    )
    if not found:
        return None
    return method, [("best", found[-1]), ("median", found[len(found) // 2]), ("worst", found[0])]


def sheet(plan: Plan, rows: Sequence[Row]) -> bytes | None:
    """A PNG: two lines a case, the pictures, and below each its difference from plain, four times; None if there is
    nothing to show."""
    found = chosen(plan.methods, rows)
    if found is None:
        return None
    method, picked = found
    methods = shown(plan.methods)
    font, small = ImageFont.load_default(14), ImageFont.load_default(11)
    step_x, step_y = _PANEL + _MARGIN, 2 * _PANEL + 66
    image = Image.new("RGB", (_MARGIN + (len(methods) + 1) * step_x, _MARGIN + len(picked) * step_y), _PAPER)
    ink = ImageDraw.Draw(image)
    psnr = {(row["method"], row["setting"], row["prompt"], row["seed"]): row["psnr"] for row in rows}
    for number, (name, row) in enumerate(picked):
        top = _MARGIN + number * step_y
        case = next(c for c in plan.cases if (c.prompt, c.seed) == (row["prompt"], row["seed"]))
        text = f"{name} of {method.label}: “{case.prompt}”, seed {case.seed}"
        ink.text((_MARGIN, top), textwrap.shorten(text, 25 * (len(methods) + 1)), _INK, font)
        plain = _draw(plan, plan.plain, case)
        image.paste(_panel(plain), (_MARGIN, top + 22))
        ink.text((_MARGIN, top + 24 + _PANEL), "plain", _INK, small)
        for column, other in enumerate(methods, 1):
            left, picture = _MARGIN + column * step_x, _draw(plan, other, case)
            image.paste(_panel(picture), (left, top + 22))
            value = psnr[other.name, other.setting, case.prompt, case.seed]
            ink.text((left, top + 24 + _PANEL), textwrap.shorten(f"{value:.1f} dB {other.label}", 34), _INK, small)
            image.paste(_panel((picture - plain).abs() * 4 - 1), (left, top + 42 + _PANEL))
    content = io.BytesIO()
    image.save(content, format="png", optimize=True)
    return content.getvalue()


def _draw(plan: Plan, method: Method, case: Case) -> Tensor:
    """With those beside it: packages look at a whole batch."""
    group = next(group for group in plan.groups if case in group)
    return plan.draw(method, group).pictures[group.index(case)]


def _panel(picture: Tensor) -> Image.Image:
    return Image.fromarray(to_bytes(picture).numpy()).resize((_PANEL, _PANEL), Image.Resampling.NEAREST)
