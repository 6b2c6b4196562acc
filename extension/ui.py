"""The accordion in txt2img and img2img. Building it has no side effects: hosts build it several times."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr
from modules.ui_components import InputAccordion

from tome_sampler.config import MergeConfig

from . import infotext
from .fields import BY_NAME, CUSTOM, FIELDS, HIRES, OFF, PRESETS, TITLE, Field
from .request import default_args, preset_config, preset_name, read_args

JS = "js" if int(gr.__version__.split(".")[0]) >= 4 else "_js"
TO_CUSTOM = {"fn": None, JS: f"() => {CUSTOM!r}", "show_progress": False}
QUIET = {"show_progress": False, "queue": False}


def accordion(
    elem_id: Callable[[str], str],
    is_img2img: bool,
    own: Callable[[], Mapping[str, Any]],
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
        controls = {}
        main = [field for field in FIELDS if field.main]
        for pair in zip(main[::2], [*main[1::2], None], strict=False):
            with gr.Row():
                for field in pair:
                    if field is not None:
                        controls[field.name] = _control(field, values[field.name], elem_id)
        hint = gr.HTML(explained(defaults), elem_id=elem_id("hint"))
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
            with gr.Row():
                second = [
                    _control(BY_NAME[n], v, elem_id, "hires_") for n, v in zip(HIRES, defaults[last + 2 :], strict=True)
                ]
        with gr.Accordion("Advanced merge settings", open=False, elem_id=elem_id("advanced")):
            rest = [field for field in FIELDS if not field.main]
            for start in range(0, len(rest), 3):
                with gr.Row():
                    for field in rest[start : start + 3]:
                        controls[field.name] = _control(field, values[field.name], elem_id)
        status = gr.HTML(status_html(summary()), elem_id=elem_id("status"))
    status.do_not_save_to_config = True
    inputs = [enabled, preset, *(controls[field.name] for field in FIELDS), hires, hires_preset, *second]

    def write_preset(name: str) -> list[Any]:
        config = _shown_config(name, own())
        return [gr.update(**_update(field, config)) for field in FIELDS]

    def write_hires_preset(name: str) -> list[Any]:
        config = _shown_config(name, own())
        return [gr.update(**_update(BY_NAME[field], config)) for field in HIRES]

    preset.input(write_preset, inputs=[preset], outputs=inputs[first:last], **QUIET)
    hires_preset.input(write_hires_preset, inputs=[hires_preset], outputs=second, **QUIET)
    for control in controls.values():
        _by_hand(control)(inputs=None, outputs=[preset], **TO_CUSTOM)
    for control in second:
        _by_hand(control)(inputs=None, outputs=[hires_preset], **TO_CUSTOM)
    own_hires = dict(zip(HIRES, second, strict=True))
    for some in (controls, own_hires):
        some["stride"].change(_most_of_stride, inputs=[some["stride"], some["ratio"]], outputs=[some["ratio"]], **QUIET)
    for name in ("ratio", "threshold", "stride", "destinations", "search", "start", "end", "floor", "modules"):
        controls[name].change(lambda *args: explained(args), inputs=inputs, outputs=[hint], **QUIET)
    keys = [
        f"{TITLE} enabled",
        f"{TITLE} preset",
        *(field.key for field in FIELDS),
        "ToMe hires enabled",
        "ToMe hires preset",
        *(f"ToMe hires {name}" for name in HIRES),
    ]
    return inputs, [
        (component, key, _from_infotext(i)) for i, (component, key) in enumerate(zip(inputs, keys, strict=True))
    ]


def element_names() -> list[str]:
    """The last parts of the controls' elem_ids, in order."""
    names = ["enabled-checkbox", "preset", *(field.name for field in FIELDS)]
    return [*names, "hires-checkbox", "hires_preset", *(f"hires_{name}" for name in HIRES)]


def fill_pasted(text: str, params: dict[str, Any]) -> None:
    """``on_infotext_pasted``: the few entries that an infotext holds, spelt out for every control."""
    keys = [f"{TITLE} enabled", f"{TITLE} preset", *(field.key for field in FIELDS)]
    keys += ["ToMe hires enabled", "ToMe hires preset", *(f"ToMe hires {name}" for name in HIRES)]
    params.update(zip(keys, infotext.control_values(params), strict=True))


def explained(args: Sequence[Any]) -> str:
    """What the settings come to, and which of them have no effect and why."""
    try:
        request = read_args([True, CUSTOM, *list(args)[2:]])
    except ValueError as error:
        return f"<span class='tome-sampler-hint'>{html.escape(str(error))}</span>"
    config = request.config or MergeConfig()
    most = (
        f"{config.ratio:.0%}"
        if config.threshold is None
        else f"{min(config.floor, config.ratio):.0%} to {config.ratio:.0%}"
    )
    lines = [f"Merges {most} of the tokens of a layer."]
    lines += [f"<i>{label}</i> has no effect {why}." for label, why in _idle(config)]
    return "<span class='tome-sampler-hint'>" + " ".join(lines) + "</span>"


def status_html(text: str) -> str:
    """The line below the controls."""
    return f"<span class='tome-sampler-status'>{html.escape(text)}</span>"


def _idle(config: MergeConfig) -> list[tuple[str, str]]:
    found = []
    if config.ratio == 0:
        found.append(("everything", "at the ratio 0"))
    if config.threshold is None:
        found.append((BY_NAME["floor"].label, "without a threshold"))
        found.append((BY_NAME["batch_rule"].label, "without a threshold"))
    if config.destinations != "grid" and config.random:
        found.append((BY_NAME["random"].label, f"with the destinations '{config.destinations}'"))
    if config.destinations != "pool":
        found.append((BY_NAME["pool"].label, f"with the destinations '{config.destinations}'"))
    if config.search == "global":
        found.append((BY_NAME["neighbourhood"].label, "with the global search"))
    if config.start >= config.end:
        found.append(("merging", "as it ends where it starts"))
    return found


def _control(field: Field, value: Any, elem_id: Callable[[str], str], prefix: str = "") -> Any:
    common = {
        "label": ("Hires " + field.label.lower()) if prefix else field.label,
        "elem_id": elem_id(prefix + field.name),
    }
    if field.kind == "flag":
        return gr.Checkbox(value, info=field.info, **common)
    if field.kind == "choice":
        return gr.Radio(list(field.choices), value=value, info=field.info, **common)
    if field.kind == "choices":
        return gr.CheckboxGroup(list(field.choices), value=value, info=field.info, **common)
    if field.kind in ("refresh", "tokens"):
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


def _by_hand(component: Any) -> Any:
    """The event of a user's own input, so that what a preset or a paste writes does not count as one."""
    return getattr(component, "input", None) or component.change


def _from_infotext(index: int) -> Callable[[Mapping[str, Any]], Any]:
    return lambda params: infotext.control_values(params)[index]
