"""From a command line to results."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tome_sampler.eval.measure import Plan, measure, parts_of
from tome_sampler.eval.methods import OURS, applicable, read_methods
from tome_sampler.eval.pictures import read_pictures
from tome_sampler.eval.plot import plot, plotter
from tome_sampler.eval.processes import Processes
from tome_sampler.eval.prompts import cases, held_out_captions, read_prompts
from tome_sampler.eval.report import conditions, report
from tome_sampler.eval.rows import Row, check_rows, read_rows
from tome_sampler.eval.sheet import sheet
from tome_sampler.eval.summary import points
from tome_sampler.eval.weights import clip_score, inception_distances, lpips
from tome_sampler.generate.command import size_of
from tome_sampler.models import Model, open_model
from tome_sampler.models.run import Settings
from tome_sampler.saving import write_whole


def evaluate(args: argparse.Namespace) -> int:
    """Draw, compare, report.

    Raises:
        ValueError: what the user gave cannot be used, with the reason. ImportError: an option needs a package that is
            not there. OSError: a file cannot be read or written; the rows that were written are whole.
    """
    _check(args)
    methods, notes = read_methods(args.methods)
    ours = [method.curve for method in methods if method.name in OURS]
    if args.matched is not None and args.matched not in ours:
        known = ", ".join(dict.fromkeys(ours)) or "a curve of our presets, of which none is asked for"
        raise ValueError(f"matched is {args.matched!r}; it must be one of {known}")
    labels = [method.label for method in methods if not method.is_plain]
    if args.against is not None and args.against not in labels:
        raise ValueError(f"against is {args.against!r}; it must be one of the methods, {', '.join(labels)}")
    prompts = None if args.prompt_file is None else read_prompts(args.prompt_file)
    pyplot: Any = plotter() if args.plot else None
    torch.set_num_threads(args.threads)
    processes = Processes(args.device)
    model = open_model(
        args.model,
        device=processes.device,
        dtype=args.dtype,
        config=args.model_config,
        allow_pickle=args.allow_pickle,
    )
    if model.usual.frames is not None:
        raise ValueError(f"{model.name} draws clips, and eval compares pictures; generate --compare compares clips")
    methods, left_out = applicable(methods, model, asked=args.methods is not None)
    notes += left_out
    settings = _settings(args, model)
    if prompts is None:
        if model.name != "embedded":
            raise ValueError(f"{model.name} needs --prompt-file; only the embedded model has captions of its own")
        prompts = held_out_captions(args.prompts, args.first_seed)
    elif model.name == "embedded":
        model.condition(prompts, settings.size)  # a prompt that it does not know is told before anything is drawn
    if args.reference is not None:
        read_pictures(args.reference)
    extras = [make(path) for make, path in ((lpips, args.lpips), (clip_score, args.clip)) if path is not None]
    distances = None if args.inception is None else inception_distances(args.inception)
    device = next(model.module.parameters()).device.type
    plan = Plan(
        model=model,
        negative=args.negative,
        cases=cases(prompts, args.seeds, args.first_seed),
        methods=methods,
        settings=settings,
        batch=args.batch,
        run={
            "model": model.name,
            "size": list(settings.size),
            "steps": settings.steps,
            "sampler": settings.sampler,
            "cond_scale": settings.cond_scale,
            "batch": args.batch,
            "first_seed": args.first_seed,
            "device": device,
            "threads": args.threads,
            "clock": "process CPU time" if device == "cpu" and args.threads == 1 else "wall clock",
            "weights": [name for name in ("lpips", "clip") if getattr(args, name) is not None],
            **({} if args.dtype == "fp32" else {"dtype": args.dtype}),
            **({} if not args.negative else {"negative": args.negative}),
        },
        extras=extras,
        pictures=args.pictures,
    )
    with tempfile.TemporaryDirectory() as folder:
        file = args.json or Path(folder) / "rows.jsonl"
        for path in (file, *parts_of(file)):
            check_rows(read_rows(path), plan.run, methods, path)
        rows = measure(plan, file, processes, progress=not args.quiet)
    if not processes.first:
        return 0
    found = points(methods, rows)
    notes += _said(rows)
    if distances is not None:
        notes.append(distances(plan, args.reference))
    if processes.count > 1:
        notes.append(f"Drawn by {processes.count} processes.")
    text = report(plan.run, found, notes, args.matched, args.against)
    print(text, end="")
    if args.markdown:
        write_whole(args.markdown, text.encode())
    if args.plot:
        write_whole(args.plot, plot(pyplot, found, conditions(plan.run, found)))
    if args.sheet and (drawn := sheet(plan, rows)):
        write_whole(args.sheet, drawn)
    return 0


def _said(rows: Sequence[Row]) -> list[str]:
    """What sessions noted, with the methods that they did so of: why nothing was merged, say."""
    methods: dict[str, list[str]] = {}
    for row in rows:
        for note in row.get("notes", ()):
            label = row["method"] + (f":{row['setting']}" if row["setting"] else "")
            methods.setdefault(note, []).append(label)
    return [f"{', '.join(dict.fromkeys(labels))}: {note}." for note, labels in methods.items()]


def _check(args: argparse.Namespace) -> None:
    for name, low in (("prompts", 1), ("seeds", 1), ("batch", 1), ("threads", 1), ("first_seed", 0)):
        if getattr(args, name) < low:
            raise ValueError(f"{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {low}")
    for path in (args.json, args.markdown, args.plot, args.sheet):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
    if args.inception is not None and args.pictures is None:
        raise ValueError("--inception needs --pictures, the folder that it takes the pictures from")
    if args.reference is not None and args.inception is None:
        raise ValueError("--reference needs --inception, which compares with it")


def _settings(args: argparse.Namespace, model: Model) -> Settings:
    usual = model.usual
    settings = Settings(
        size=usual.size if args.size is None else size_of(args.size),
        steps=usual.steps if args.steps is None else args.steps,
        sampler=usual.sampler if args.sampler is None else args.sampler,
        cond_scale=usual.cond_scale if args.cond_scale is None else args.cond_scale,
    )
    model.latent_shape(settings.size)  # which says what is wrong with a size
    return settings
