"""Everything that a WebUI is told of once, when it loads the extension."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modules import script_callbacks, shared
from modules.paths import data_path

from . import api, infotext, settings, tab, ui, xyz
from .fields import TITLE
from .maps import KINDS, drawn
from .obstacles import obstacle
from .presets import Presets
from .run import Run

run = Run()
presets = Presets(Path(data_path) / "tome-sampler" / "presets.json")


def register() -> None:
    """Callbacks; hosts drop them when the UI is reloaded."""
    script_callbacks.on_ui_settings(settings.add_options)
    script_callbacks.on_before_ui(lambda: xyz.add_axes(presets.saved))
    script_callbacks.on_infotext_pasted(ui.fill_pasted)
    script_callbacks.on_cfg_denoiser(before_call)
    script_callbacks.on_cfg_denoised(run_after_call)
    script_callbacks.on_cfg_after_cfg(run_after_guidance)
    script_callbacks.on_image_saved(image_saved)
    script_callbacks.on_after_component(tab.see_component)
    script_callbacks.on_ui_tabs(lambda: tab.tabs(run, presets))
    script_callbacks.on_app_started(lambda demo, app: api.add_routes(app, run, presets))
    script_callbacks.on_script_unloaded(run.unloaded)


def before_call(params: Any) -> None:
    """``on_cfg_denoiser``; of no cost while nothing merges."""
    if run.at_work:
        run.before_call(params, shared.sd_model)


def run_after_call(params: Any) -> None:
    """``on_cfg_denoised``."""
    if run.at_work:
        run.after_call(params)


def run_after_guidance(params: Any) -> None:
    """``on_cfg_after_cfg``."""
    if run.at_work:
        run.after_guidance()


def image_saved(params: Any) -> None:
    """``on_image_saved``: the maps, which are of a batch's first picture, beside it."""
    wanted = run.owns(params.p) and bool(settings.value("save_overlays", False))
    path = Path(params.filename)
    if not wanted or getattr(params.p, "batch_index", 0) != 0 or path.name.startswith("grid-"):
        return
    merged = [one for one in run.record_of(params.p).batch if not one.aside]
    maps = merged[-1].maps if merged else []
    for kind in KINDS:
        image = drawn(maps[-1], params.image, kind) if maps else None
        if image is not None:
            image.save(path.with_name(f"{path.stem}-tome-{kind}.png"))


def controls(elem_id: Any, is_img2img: bool) -> tuple[list[Any], list[Any], list[str]]:
    """The accordion: its components, the infotext fields, and the names that travel between the tabs."""
    components, told = ui.accordion(
        elem_id, is_img2img, presets.saved, lambda: run.record.summary, settings.default_preset()
    )
    return components, [_paste_field(*one) for one in told], [key for _, key, _ in told]


def prepare(p: Any, args: Any) -> None:
    """``process``."""
    settings.apply_log_level()
    run.prepare(p, args, presets.saved(), settings.default_preset(), settings.least_tokens())


def begin_pass(p: Any, latent: Any) -> None:
    """``process_before_every_sampling``."""
    if run.wanted(p):
        run.begin_pass(p, latent, obstacle(p), bool(settings.value("keep_maps", True)))


def finish(p: Any, processed: Any) -> None:
    """``postprocess``."""
    run.end_pass()
    images = getattr(processed, "images", None) or []
    first = getattr(processed, "index_of_first_image", 0)
    if run.owns(p) and len(images) > first:
        run.record_of(p).keep_picture(images[first])
    run.over(p)


def guard(p: Any) -> None:
    """``setup``: clean up when `p` is closed too, because an exception in sampling skips all later hooks."""
    close = p.close

    def close_and_end() -> None:
        run.over(p)
        close()

    p.close = close_and_end


def _paste_field(component: Any, key: str, from_infotext: Any) -> Any:
    """A key for the page, which also says what "send to" carries over, and a function for the API, which would read
    "False" as true."""
    try:
        from modules.infotext_utils import PasteField
    except ImportError:
        return component, from_infotext
    field = PasteField(component, key)
    field.function = from_infotext
    return field


__all__ = ["TITLE", "begin_pass", "controls", "finish", "guard", "infotext", "prepare", "register", "run"]
