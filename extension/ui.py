"""The accordion in txt2img and img2img. Building it has no side effects: hosts build it several times."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr
from modules.ui_components import InputAccordion

from tome_sampler.config import MergeConfig

from . import infotext
from .fields import BY_NAME, CUSTOM, FIELDS, HIRES, MAIN, OFF, PRESETS, TITLE, Field
from .request import default_args, hires_controls, preset_config, preset_name, read_args

JS = "js" if int(gr.__version__.split(".")[0]) >= 4 else "_js"
TO_CUSTOM = {"fn": None, JS: f"() => {CUSTOM!r}", "show_progress": False}
QUIET = {"show_progress": False, "queue": False}
EXPLAINED = (
    *("ratio", "early_ratio", "early_sigma", "threshold", "floor", "stride", "destinations", "search", "start", "end"),
    *("modules", "early_modules", "batch_rule", "random", "pool", "neighbourhood"),
)


def accordion(
    elem_id: Callable[[str], str],
    is_img2img: bool,
    own: Callable[[], Mapping[str, Mapping[str, Any]]],
    summary: Callable[[], str],
    start: str,
) -> tuple[list[Any], list[tuple[Any, str, Callable[[Mapping[str, Any]], Any]]]]:
    """The controls in the order of :func:`request.default_args`, and for each its infotext key and what it takes from
    an infotext.

    Args:
        own: the user's presets by name. summary: a line on the last run. start: the preset to start with.
    """
    defaults = default_args(start)
    first, last = 2, 2 + len(FIELDS)
    values = dict(zip((f.name for f in FIELDS), defaults[first:last], strict=True))
    with InputAccordion(False, label=TITLE, elem_id=elem_id("enabled")) as enabled:
        with gr.Row():
            names = [OFF, *PRESETS, CUSTOM, *own()]
            preset = gr.Dropdown(names, value=defaults[1], label="Merge preset", elem_id=elem_id("preset"))
        controls = _rows(MAIN, 2, values, elem_id)
        hint = gr.HTML(explained(defaults, own()), elem_id=elem_id("hint"))
        # txt2img alone has a second pass
        with (
            gr.Group(visible=not is_img2img),
            InputAccordion(False, label="Override for hires fix", elem_id=elem_id("hires")) as hires,
        ):
            hires_preset = gr.Dropdown(
                [OFF, *PRESETS, CUSTOM, *own()],
                value=defaults[last + 1],
                label="Hires merge preset",
                elem_id=elem_id("hires_preset"),
            )
            own_hires = _rows(HIRES, 3, dict(zip(HIRES, defaults[last + 2 : -1], strict=True)), elem_id, "hires_")
            others = gr.Textbox(
                defaults[-1],
                label="Hires other settings",
                info="field=value, with commas between them: whatever else is not to be as in the first pass",
                max_lines=1,
                elem_id=elem_id("hires_others"),
            )
            second = [*own_hires.values(), others]
        with gr.Accordion("Advanced merge settings", open=False, elem_id=elem_id("advanced")):
            early = ("early_sigma", "early_modules")
            rest = [*early, *(f.name for f in FIELDS if f.name not in (*MAIN, *early))]
            controls |= _rows(rest, 3, values, elem_id)
        status = gr.HTML(status_html(summary()), elem_id=elem_id("status"))
    # the host would keep what the presets were when it first saw them, and later show that under their names
    for component in (status, preset, *controls.values(), *second):
        component.do_not_save_to_config = True
    inputs = [enabled, preset, *(controls[field.name] for field in FIELDS), hires, hires_preset, *second]

    def write_preset(name: str) -> list[Any]:
        config = _shown_config(name, own())
        return [gr.update(**_update(field, config)) for field in FIELDS]

    def write_hires_preset(name: str, *controls: Any) -> list[Any]:
        config = _shown_config(name, own())
        others = hires_controls(config, _first_pass(controls, own()))[-1]
        return [*(gr.update(**_update(BY_NAME[field], config)) for field in HIRES), gr.update(value=others)]

    preset.input(write_preset, inputs=[preset], outputs=inputs[first:last], **QUIET)
    hires_preset.input(write_hires_preset, inputs=[hires_preset, *inputs[1:last]], outputs=second, **QUIET)
    for control in controls.values():
        _by_hand(control)(inputs=None, outputs=[preset], **TO_CUSTOM)
    for control in second:
        _by_hand(control)(inputs=None, outputs=[hires_preset], **TO_CUSTOM)
    for some in (controls, own_hires):
        some["stride"].change(_most_of_stride, inputs=[some["stride"], some["ratio"]], outputs=[some["ratio"]], **QUIET)
    for name in EXPLAINED:
        controls[name].change(lambda *args: explained(args, own()), inputs=inputs, outputs=[hint], **QUIET)
    return inputs, [
        (component, key, _from_infotext(i)) for i, (component, key) in enumerate(zip(inputs, _keys(), strict=True))
    ]


def element_names() -> list[str]:
    """The last parts of the controls' elem_ids, in order."""
    names = ["enabled-checkbox", "preset", *(field.name for field in FIELDS)]
    return [*names, "hires-checkbox", "hires_preset", *(f"hires_{name}" for name in HIRES), "hires_others"]


def fill_pasted(text: str, params: dict[str, Any]) -> None:
    """``on_infotext_pasted``: the few entries that an infotext holds, spelt out for every control."""
    params.update(zip(_keys(), infotext.control_values(params), strict=True))


def explained(args: Sequence[Any], own: Mapping[str, Mapping[str, Any]]) -> str:
    """What the settings come to, and which of those that were changed have no effect and why. own: the user's presets
    by name."""
    try:
        request = read_args([True, CUSTOM, *list(args)[2:]], own)
    except ValueError as error:
        return f"<span class='tome-sampler-hint'>{html.escape(str(error))}</span>"
    config = request.config or MergeConfig()
    lines = [_share(config), *(f"<i>{BY_NAME[name].label}</i> has no effect {why}." for name, why in _idle(config))]
    return "<span class='tome-sampler-hint'>" + " ".join(lines) + "</span>"


def _keys() -> list[str]:
    """The controls' infotext keys, in order."""
    names = [f"{TITLE} enabled", f"{TITLE} preset", *(field.key for field in FIELDS)]
    return [*names, *(f"ToMe hires {name}" for name in ("enabled", "preset", *HIRES, "others"))]


def status_html(text: str) -> str:
    """The line below the controls."""
    return f"<span class='tome-sampler-status'>{html.escape(text)}</span>"


def _share(config: MergeConfig) -> str:
    """How much is merged, and when."""
    if config.ratio == 0:
        return "Merges nothing in any part of the run: the ratio is 0."
    if config.start >= config.end:
        return "Merges nothing: it ends where it starts."
    later = f"{config.ratio:.0%}"
    if config.threshold is not None:
        later = f"{min(config.floor, config.ratio):.0%} to {later}"
    text = f"Merges {later} of the tokens of {_where(config)}"
    if config.early is not None:
        first, early = f"{config.early.ratio:.0%}", _where(config.early)
        text = f"Merges {first} of the tokens of {early} while sigma is above {config.early_sigma:g}, then {later}"
        if early != _where(config):
            text += f" of {_where(config)}"
    if config.start > 0 or config.end < 1:
        text += f"; only from {config.start:.0%} to {config.end:.0%} of the noise schedule"
    return text + "."


def _where(config: MergeConfig) -> str:
    return "a whole block" if "block" in config.modules else "a layer"


def _idle(config: MergeConfig) -> list[tuple[str, str]]:
    """The settings that do nothing beside the others, and why; not those that nobody has touched."""
    if config.ratio == 0 or config.start >= config.end:
        return []
    found = {}
    if config.early is None:
        found |= dict.fromkeys(("early_sigma", "early_modules"), "without an early ratio")
    if config.threshold is None:
        found |= dict.fromkeys(("floor", "batch_rule"), "without a threshold")
    if config.destinations != "grid":
        found["random"] = f"with the destinations '{config.destinations}'"
    if config.destinations != "pool":
        found["pool"] = f"with the destinations '{config.destinations}'"
    if config.search == "global":
        found["neighbourhood"] = "with the global search"
    untouched = MergeConfig()
    return [(name, why) for name, why in found.items() if getattr(config, name) != getattr(untouched, name)]


def _rows(
    names: Sequence[str], width: int, values: Mapping[str, Any], elem_id: Callable[[str], str], prefix: str = ""
) -> dict[str, Any]:
    """Controls by name, `width` in a row."""
    controls = {}
    for start in range(0, len(names), width):
        with gr.Row():
            for name in names[start : start + width]:
                controls[name] = _control(BY_NAME[name], values[name], elem_id, prefix)
    return controls


def _control(field: Field, value: Any, elem_id: Callable[[str], str], prefix: str = "") -> Any:
    common = {
        "label": ("Hires " + field.label.lower()) if prefix else field.label,
        "elem_id": elem_id(prefix + field.name),
    }
    if field.kind == "flag":
        return gr.Checkbox(value, info=field.info, **common)
    if field.kind == "choice":
        return gr.Radio(list(field.choices), value=value, info=field.info, **common)
    if field.several:
        return gr.CheckboxGroup(list(field.choices), value=value, info=field.info, **common)
    if field.kind in ("refresh", "optional", "tokens"):
        return gr.Dropdown(list(field.choices), value=value, info=field.info, allow_custom_value=True, **common)
    if field.kind == "whole" and field.high > 1e6:
        return gr.Number(value, precision=0, info=field.info, **common)
    high = _most(MergeConfig().stride) if field.name == "ratio" else field.high
    return gr.Slider(minimum=field.low, maximum=high, step=_fine(field), value=value, info=field.info, **common)


def _fine(field: Field) -> float:
    return 0.0125 if field.name in ("ratio", "floor") else field.step  # so that 0.9375 can be reached


def _most(stride: int) -> float:
    return 1 - 1 / stride**2


def _most_of_stride(stride: Any, ratio: Any) -> Any:
    """The ratio's slider ends where the cell size does."""
    if not isinstance(stride, (int, float)) or stride < 2:
        return gr.update()
    most = min(_most(int(stride)), BY_NAME["ratio"].high)
    return gr.update(maximum=most, value=min(float(ratio), most))


def _update(field: Field, config: MergeConfig) -> dict[str, Any]:
    update = {"value": field.shown(config)}
    if field.name == "ratio":
        update["maximum"] = min(_most(config.stride), field.high)
    return update


def _shown_config(name: str, own: Mapping[str, Any]) -> MergeConfig:
    try:
        return preset_config(preset_name(name, own), own) or MergeConfig()
    except ValueError:
        return MergeConfig()


def _first_pass(controls: Sequence[Any], own: Mapping[str, Any]) -> MergeConfig | None:
    """What the first pass's preset and controls say; None: off, or nothing that can be read."""
    try:
        return read_args([True, *controls], own).config
    except ValueError:
        return None


def _by_hand(component: Any) -> Any:
    """The event of a user's own input, so that what a preset or a paste writes does not count as one."""
    return getattr(component, "input", None) or component.change


def _from_infotext(index: int) -> Callable[[Mapping[str, Any]], Any]:
    return lambda params: infotext.control_values(params)[index]
