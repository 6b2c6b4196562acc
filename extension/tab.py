"""The tab: the last run at a glance, Measure, and the user's own presets."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable
from typing import Any

import gradio as gr
from PIL import Image

from . import ui
from .fields import CUSTOM, OFF, PRESETS, TITLE
from .maps import drawn, png
from .measure import SETTINGS, Measured, measure
from .presets import Presets
from .record import RunRecord
from .request import default_args, read_args
from .run import Run

COLOURS = ("#d97706", "#2563eb", "#059669", "#db2777", "#7c3aed", "#475569")
_seen: dict[str, Any] = {}  # the page's components by elem_id, as the host builds them


def see_component(component: Any, **kwargs: Any) -> None:
    """``on_after_component``: remember what the tab reads from and writes to."""
    name = kwargs.get("elem_id") or getattr(component, "elem_id", None) or ""
    ours = name.startswith(("script_txt2img_tome_sampler_", "script_img2img_tome_sampler_"))
    if name in SETTINGS or name in ("html_log_txt2img", "html_log_img2img") or ours:
        _seen[name] = component


def tabs(run: Run, presets: Presets) -> list[tuple[Any, str, str]]:
    """``on_ui_tabs``."""
    # what the page holds now: hosts build the accordion again later, in blocks that they throw away
    page = dict(_seen)
    with gr.Blocks(analytics_enabled=False) as blocks, gr.Tabs(elem_id="tome_sampler_tabs"):
        with gr.Tab("Last run", elem_id="tome_sampler_last"):
            _last_run(run)
        with gr.Tab("Measure", elem_id="tome_sampler_measure_tab"):
            _measure(run, presets, page)
        with gr.Tab("Presets", elem_id="tome_sampler_presets_tab"):
            _own_presets(presets, page)
        for tab in ("txt2img", "img2img"):  # the host writes its log line when a generation is over
            log, status = page.get(f"html_log_{tab}"), page.get(f"script_{tab}_tome_sampler_status")
            if log is not None and status is not None:
                log.change(lambda: ui.status_html(run.record.summary), inputs=None, outputs=[status], **ui.QUIET)
    return [(blocks, TITLE, "tome_sampler")]


def _last_run(run: Run) -> None:
    refresh = gr.Button("Show the last run", variant="primary", elem_id="tome_sampler_refresh")
    summary = gr.HTML(report_html(run.record), elem_id="tome_sampler_summary")
    with gr.Row():
        kind = gr.Radio(
            ["Importance", "Merged groups"], value="Merged groups", label="Map", elem_id="tome_sampler_map_kind"
        )
        number = gr.Slider(minimum=1, maximum=1, step=1, value=1, label="New pairs", elem_id="tome_sampler_map_number")
    picture = gr.HTML(map_html(run.record, 1, "Merged groups"), elem_id="tome_sampler_map")

    def show(which: str) -> list[Any]:
        most = max(sum(len(p.maps) for p in run.record.passes), 1)
        return [
            report_html(run.record),
            gr.update(maximum=most, value=most),
            map_html(run.record, most, which),
        ]

    refresh.click(show, inputs=[kind], outputs=[summary, number, picture], **ui.QUIET)
    for control in (kind, number):
        control.change(
            lambda n, which: map_html(run.record, n, which), inputs=[number, kind], outputs=[picture], **ui.QUIET
        )


def _measure(run: Run, presets: Presets, page: dict[str, Any]) -> None:
    inputs = [(SETTINGS[name], page[name]) for name in SETTINGS if name in page]
    controls = _controls_of(page, "txt2img")
    if not inputs or len(controls) != len(default_args()):
        gr.HTML("Measure needs the txt2img page, which this host builds later or not at all.")
        return
    gr.HTML(
        "Runs the txt2img settings as they stand on that tab (prompt, sampler, steps, size, CFG, seed), plain and "
        "merged with the same seed. Other scripts stay at their defaults, and nothing is saved."
    )
    with gr.Row():
        runs = gr.Slider(minimum=1, maximum=5, step=1, value=1, label="Runs of each", elem_id="tome_sampler_runs")
        start = gr.Button("Measure", variant="primary", elem_id="tome_sampler_measure")
    result = gr.HTML("", elem_id="tome_sampler_measured")

    def run_both(count: float, *values: Any) -> Any:
        settings = dict(zip((name for name, _ in inputs), values[: len(inputs)], strict=True))
        chosen = [True, *values[len(inputs) + 1 :]]
        try:
            read_args(chosen, presets.saved())
            for found in measure(settings, chosen, int(count), lambda: run.record.summary):
                yield measured_html(found) if isinstance(found, Measured) else progress_html(*found)
        except (ValueError, RuntimeError) as error:
            yield f"<p class='tome-sampler-error'>{html.escape(str(error))}</p>"

    start.click(run_both, inputs=[runs, *(c for _, c in inputs), *controls], outputs=[result], show_progress=False)


def _own_presets(presets: Presets, page: dict[str, Any]) -> None:
    controls = _controls_of(page, "txt2img")
    accordions = [
        page[name]
        for tab in ("txt2img", "img2img")
        for name in (f"script_{tab}_tome_sampler_preset", f"script_{tab}_tome_sampler_hires_preset")
        if name in page
    ]
    with gr.Row():
        own = gr.Dropdown(presets.names(), label="Your presets", elem_id="tome_sampler_own")
        name = gr.Textbox(label="Name", max_lines=1, elem_id="tome_sampler_own_name")
    with gr.Row():
        save = gr.Button("Save the txt2img settings under this name", elem_id="tome_sampler_own_save")
        rename = gr.Button("Rename the chosen one to this name", elem_id="tome_sampler_own_rename")
        delete = gr.Button("Delete the chosen one", elem_id="tome_sampler_own_delete")
    text = gr.Textbox(label="JSON", lines=8, elem_id="tome_sampler_own_json")
    with gr.Row():
        export = gr.Button("Export all to JSON", elem_id="tome_sampler_own_export")
        load = gr.Button("Import from JSON", elem_id="tome_sampler_own_import")
    said = gr.HTML("", elem_id="tome_sampler_own_said")
    outputs = [said, own, *accordions]

    def done(message: str, chosen: str | None = None) -> list[Any]:
        names = presets.names()
        everywhere = [OFF, *PRESETS, CUSTOM, *names]
        picked = gr.update(choices=names, value=chosen if chosen in names else None)
        return [f"<p>{html.escape(message)}</p>", picked, *(gr.update(choices=everywhere) for _ in accordions)]

    def attempt(action: Callable[[], None], message: str, chosen: str | None = None) -> list[Any]:
        try:
            action()
        except (ValueError, OSError) as error:
            return wrong(error)
        return done(message, chosen)

    def wrong(error: Exception) -> list[Any]:
        return [f"<p class='tome-sampler-error'>{html.escape(str(error))}</p>", *(gr.update() for _ in outputs[1:])]

    def save_it(given: str, *values: Any) -> list[Any]:
        def action() -> None:
            config = read_args([True, *values[1:]], presets.saved()).config
            if config is None:
                raise ValueError("the accordion's preset is Off; there is nothing to save")
            presets.save(given, config)

        return attempt(action, f"Saved {given!r}.", given.strip())

    def load_it(given: str) -> list[Any]:
        try:
            added, replaced = presets.load(given)
        except (ValueError, OSError) as error:
            return wrong(error)
        words = (("Added", added), ("Replaced", replaced))
        said = " ".join(f"{word} {', '.join(map(repr, names))}." for word, names in words if names)
        return done(said or "There was nothing to import.")

    if len(controls) == len(default_args()):
        save.click(save_it, inputs=[name, *controls], outputs=outputs, **ui.QUIET)
    rename.click(
        lambda old, new: attempt(lambda: presets.rename(old or "", new), f"Renamed {old!r} to {new!r}.", new.strip()),
        inputs=[own, name],
        outputs=outputs,
        **ui.QUIET,
    )
    delete.click(
        lambda old: attempt(lambda: presets.delete(old or ""), f"Deleted {old!r}."),
        inputs=[own],
        outputs=outputs,
        **ui.QUIET,
    )
    export.click(lambda: presets.exported(), inputs=None, outputs=[text], **ui.QUIET)
    load.click(load_it, inputs=[text], outputs=outputs, **ui.QUIET)


def _controls_of(page: dict[str, Any], tab: str) -> list[Any]:
    """The accordion's components of a tab, in order."""
    names = ui.element_names()
    found = [page.get(f"script_{tab}_tome_sampler_{name}") for name in names]
    return [component for component in found if component is not None]


def report_html(record: RunRecord) -> str:
    """The last run: a line, and for each pass a chart of the tokens its layers worked on."""
    parts = [f"<p class='tome-sampler-status'>{html.escape(record.summary)}</p>"]
    for one in record.passes:
        if one.stats is not None:
            chart = chart_html(one.stats) if not one.aside else f"<p>Stood aside: {html.escape(one.aside)}</p>"
            parts.append(f"<h3>{one.title}, {one.seconds:.1f} s</h3>{chart}")
            parts += [f"<p>{html.escape(note)}</p>" for note in one.stats["notes"]]
    return "<div class='tome-sampler-report'>" + "".join(parts) + "</div>"


def chart_html(stats: dict[str, Any]) -> str:
    """Share of tokens kept at each model call, a line for each level, as an SVG; dots where pairs were made."""
    steps = stats["steps"]
    levels: dict[int, list[tuple[int, float, bool]]] = {}
    for n, step in enumerate(steps):
        of_level: dict[int, list[dict[str, Any]]] = {}
        for layer in step["layers"].values():
            of_level.setdefault(layer["tokens_before"], []).append(layer)
        for tokens, layers in of_level.items():
            kept = sum(layer["tokens_after"] for layer in layers) / max(
                sum(layer["tokens_before"] for layer in layers), 1
            )
            levels.setdefault(tokens, []).append((n, kept, any(layer["pairings_made"] for layer in layers)))
    if not levels:
        return "<p>No layer was merged.</p>"
    width, height, left, top = 720, 200, 44, 12
    span = max(len(steps) - 1, 1)
    x = lambda n: left + n / span * (width - left - 12)  # noqa: E731
    y = lambda kept: top + (1 - kept) * (height - top - 28)  # noqa: E731
    lines = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        lines.append(
            f"<line x1='{left}' x2='{width - 12}' y1='{y(share):.1f}' y2='{y(share):.1f}' stroke='currentColor' "
            f"opacity='.15'/><text x='{left - 6}' y='{y(share) + 4:.1f}' text-anchor='end' font-size='11' "
            f"fill='currentColor'>{share:.0%}</text>"
        )
    legend = []
    for (tokens, points), colour in zip(sorted(levels.items(), reverse=True), COLOURS * 9, strict=False):
        path = " ".join(f"{x(n):.1f},{y(kept):.1f}" for n, kept, _ in points)
        lines.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>")
        lines += [
            f"<circle cx='{x(n):.1f}' cy='{y(kept):.1f}' r='3.5' fill='{colour}'><title>call {n}: {kept:.0%} kept, "
            f"new pairs</title></circle>"
            for n, kept, made in points
            if made
        ]
        legend.append(f"<span style='color:{colour}'>&#9632;</span> {tokens} tokens")
    lines.append(
        f"<text x='{(left + width) / 2}' y='{height - 4}' text-anchor='middle' font-size='11' fill='currentColor'>"
        "model call</text>"
    )
    made, reused = stats["pairings_made"], stats["pairings_reused"]
    similarity = stats["mean_similarity"]
    costs = [
        f"{stats[name]:.2f} s {word}"
        for name, word in (("seconds_matching", "making pairs"), ("seconds_merging", "merging and unmerging"))
        if stats[name] is not None
    ]
    costs.append(f"{stats['cache_bytes'] / 2**20:.1f} MB of pairs kept")
    return (
        f"<svg viewBox='0 0 {width} {height}' class='tome-sampler-chart' role='img' "
        f"aria-label='share of tokens kept at each model call'>{''.join(lines)}</svg>"
        f"<p>Tokens kept, of a batch: {', '.join(legend)}. Dots: new pairs. Made {made}, reused {reused}"
        + (f", mean similarity {similarity:.3f}" if similarity is not None else "")
        + f".</p><p>{', '.join(costs)}</p>"
    )


def map_html(record: RunRecord, number: Any, which: str) -> str:
    """A map of the last run over its picture, counted from 1."""
    maps = [one for p in record.passes for one in p.maps]
    index = int(number or 1) - 1
    if not 0 <= index < len(maps):
        return "<p>No maps yet: generate with ToMe Sampler on.</p>"
    image = drawn(maps[index], record.picture, "importance" if which == "Importance" else "groups")
    if image is None:
        return "<p>No importance here: no guidance ran before these pairs were made.</p>"
    sigma = maps[index].sigma
    caption = f"{which}, {index + 1} of {len(maps)}" + (f", sigma {sigma:.2f}" if sigma is not None else "")
    h, w = maps[index].grid
    target = maps[index].target.cpu().numpy().astype("<u4")
    groups = base64.b64encode(target.tobytes()).decode()  # for the page's script
    return (
        f"<figure class='tome-sampler-map'><div class='tome-sampler-over' data-grid='{h},{w}' data-groups='{groups}'>"
        f"{_img(image)}<canvas width='{w}' height='{h}'></canvas></div>"
        f"<figcaption>{html.escape(caption)}. <span class='tome-sampler-group'>Point at a token to see its group."
        "</span></figcaption></figure>"
    )


def progress_html(share: float, word: str) -> str:
    """A bar while Measure runs."""
    return (
        f"<div class='tome-sampler-progress'><div style='width:{share:.0%}'></div></div>"
        f"<p>{html.escape(word)}, {share:.0%}</p>"
    )


def measured_html(found: Measured) -> str:
    """Both pictures under one slider, and the figures."""
    psnr, ssim = found.fidelity
    speedup = found.seconds_plain / max(found.seconds_merged, 1e-9)
    return (
        "<div class='tome-sampler-compare' style='--split:50%'>"
        f"{_img(found.plain, 'plain')}{_img(found.merged, 'merged')}"
        "<input type='range' min='0' max='100' value='50' aria-label='plain to the left, merged to the right'></div>"
        "<p>Left: plain. Right: merged.</p>"
        f"<table class='tome-sampler-figures'><tr><th>plain</th><th>merged</th><th>speed-up</th><th>PSNR</th>"
        f"<th>SSIM</th></tr><tr><td>{found.seconds_plain:.2f} s</td><td>{found.seconds_merged:.2f} s</td>"
        f"<td>{speedup:.2f}x</td><td>{psnr:.1f} dB</td><td>{ssim:.4f}</td></tr></table>"
        f"<p>{html.escape(found.summary)}</p>"
    )


def _img(image: Image.Image, name: str = "") -> str:
    data = base64.b64encode(png(image.convert("RGB"))).decode()
    return f"<img class='{name}' alt='{name}' src='data:image/png;base64,{data}'>"
