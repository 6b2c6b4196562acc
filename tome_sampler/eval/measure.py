"""The pictures, drawn and compared one after the other: plain and then every method, prompt by prompt."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from tome_sampler.demo.check import SIZE, check_scene
from tome_sampler.eval.features import features_of
from tome_sampler.eval.flops import flops_of
from tome_sampler.eval.methods import Drawn, Method
from tome_sampler.eval.metrics import compare, named_objects
from tome_sampler.eval.pictures import path_of, save_picture
from tome_sampler.eval.processes import Processes
from tome_sampler.eval.prompts import Case, scene_of
from tome_sampler.eval.rows import Row, append_rows, key_of, read_rows, write_rows
from tome_sampler.models import Model
from tome_sampler.models.run import Settings

Extra = Callable[[Tensor, Tensor, str], dict[str, float]]
"""A further measure: of the picture, the plain picture and the prompt, figures by name."""


@dataclass(frozen=True)
class Plan:
    """All that is to be drawn. run: what must be the same in all rows of a file. batch: pictures at a time. pictures:
    the folder that they are kept in, if they are."""

    model: Model
    cases: list[Case]
    methods: list[Method]
    settings: Settings
    batch: int
    run: Row
    extras: Sequence[Extra] = ()
    negative: str = ""
    pictures: Path | None = None

    @property
    def plain(self) -> Method:
        return self.methods[0]

    @property
    def groups(self) -> list[list[Case]]:
        """What is drawn in one batch."""
        return [self.cases[i : i + self.batch] for i in range(0, len(self.cases), self.batch)]

    def keys(self, method: Method, group: Sequence[Case]) -> set[tuple[str, str, str, int]]:
        """Those of the rows that a method has of a group."""
        return {(method.name, method.setting, case.prompt, case.seed) for case in group}

    def draw(self, method: Method, group: Sequence[Case]) -> Drawn:
        clock = time.process_time if self.run["clock"] == "process CPU time" else time.perf_counter
        prompts, seeds = [case.prompt for case in group], [case.seed for case in group]
        return method.draw(self.model, prompts, seeds, self.settings, clock, negative=self.negative)

    def ordered(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that are of this plan, each once, picture by picture and in the methods' order."""
        found = {key_of(row): row for row in rows}
        keys = (key for case in self.cases for method in self.methods for key in self.keys(method, [case]))
        return [found[key] for key in keys if key in found]


def measure(plan: Plan, file: Path, processes: Processes, *, progress: bool = True) -> list[Row]:
    """Draw what `file` does not have yet. The rows of the plan, in each process the same.

    A single process appends each row to the file as soon as its picture is compared. Several append to one file each,
    beside it; at the end these become the file.

    Raises:
        OSError: a row could not be written; those before it are in the file.
    """
    alone = processes.count == 1
    parts = [part_of(file, number) for number in range(processes.count)]
    own = file if alone else parts[processes.number]
    sources = [own]
    if processes.first:  # also what a launch of more processes has left, if it was stopped
        sources += [path for path in (file, *parts_of(file)) if path != own and (alone or path not in parts)]
    known = {key_of(row): row for path in sources for row in read_rows(path)}
    if own.exists():  # without a torn line
        write_rows(own, list(known.values()))
    rows = {key_of(row): row for row in processes.gather(list(known.values()))}
    # of what is missing, not of all: a second seed that is added later would be one process's alone. As the first one
    # sees it: others may see other pictures in the folder
    missing = [number for number, group in enumerate(plan.groups) if _missing(plan, group, rows)]
    missing = processes.gather(missing if processes.first else [])
    mine = [plan.groups[number] for number in processes.share(missing)]
    if mine:
        for row in _drawn(plan, mine, rows, own, progress and processes.first):
            rows[key_of(row)] = row
    everything = {key_of(row): row for row in processes.gather(list(rows.values()))}
    asked = plan.ordered(list(everything.values()))
    if len(asked) < (all_there_are := len(plan.cases) * len(plan.methods)):
        raise RuntimeError(f"{len(asked)} of {all_there_are} pictures have been compared; the same command goes on")
    if processes.first:
        further = [everything[key] for key in everything.keys() - {key_of(row) for row in asked}]
        write_rows(file, [*asked, *sorted(further, key=key_of)])
    processes.wait()
    if processes.first:
        for part in parts_of(file):
            part.unlink(missing_ok=True)
    if own != file:
        own.unlink(missing_ok=True)
    return asked


def part_of(file: Path, number: int) -> Path:
    """Where a process of several puts its rows."""
    return file.with_name(f"{file.name}.process{number}")


def parts_of(file: Path) -> list[Path]:
    """All there are on this machine."""
    named = re.compile(re.escape(file.name) + r"\.process\d+")  # and no copy that somebody made of one
    return sorted(path for path in file.parent.iterdir() if named.fullmatch(path.name))


def _missing(plan: Plan, group: Sequence[Case], rows: dict[Any, Row]) -> list[Method]:
    """The methods that lack a row of a group, or a picture that is to be kept."""

    def there(method: Method) -> bool:
        kept = plan.pictures is None or all(path_of(plan.pictures, method, case).exists() for case in group)
        return kept and plan.keys(method, group) <= rows.keys()

    return [method for method in plan.methods if not there(method)]


def _drawn(plan: Plan, groups: Sequence[list[Case]], rows: dict[Any, Row], file: Path, progress: bool) -> Iterator[Row]:
    flops = {(row["method"], row["setting"]): row["flops"] for row in rows.values()}
    todo = sum(len(group) * len(_missing(plan, group, rows)) for group in groups)
    _warm_up(plan)
    with tqdm(total=todo, desc="eval", unit="picture", disable=not progress, smoothing=0.05) as bar:
        for number, group in enumerate(groups):
            missing = _missing(plan, group, rows)
            plain = plan.draw(plan.plain, group)
            turn = number % max(len(plan.methods) - 1, 1)
            others = [method for method in plan.methods[1 + turn :] + plan.methods[1 : 1 + turn] if method in missing]
            for method in ([plan.plain] if plan.plain in missing else []) + others:
                bar.set_postfix_str(method.label)
                if (method.name, method.setting) not in flops:
                    flops[method.name, method.setting] = _flops(plan, method)
                drawn = plain if method.is_plain else plan.draw(method, group)
                made = [_row(plan, method, case, drawn, plain, i) for i, case in enumerate(group)]
                for row in made:
                    row["flops"] = flops[method.name, method.setting]
                if plan.pictures is not None:
                    for case, picture in zip(group, drawn.pictures, strict=True):
                        save_picture(path_of(plan.pictures, method, case), picture)
                append_rows(file, made)
                yield from made
                bar.update(len(made))


def _warm_up(plan: Plan) -> None:
    """What a process does slowly the first time, out of the timed runs."""
    short = replace(plan, settings=replace(plan.settings, steps=2))
    for method in plan.methods:
        short.draw(method, plan.cases[:1])


def _flops(plan: Plan, method: Method) -> float:
    """Of one picture, counted while the first one is drawn, with what decides on merging and new pairs in it."""
    return flops_of(lambda: plan.draw(method, plan.cases[:1]))


def _row(plan: Plan, method: Method, case: Case, drawn: Drawn, plain: Drawn, place: int) -> Row:
    picture, reference = drawn.pictures[place], plain.pictures[place]
    scene = scene_of(case.prompt) if plan.model.name == "embedded" else None
    inside = None if scene is None else named_objects(scene, plan.settings.size)
    row: Row = {
        "method": method.name,
        "setting": method.setting,
        "prompt": case.prompt,
        "seed": case.seed,
        **asdict(compare(picture, reference, inside)),
        "unet_seconds": drawn.unet_seconds / len(drawn.pictures),
        "plain_seconds": plain.unet_seconds / len(plain.pictures),
        "merged_fraction": drawn.merged_fraction,
    }
    for extra in plan.extras:
        row |= extra(picture, reference, case.prompt)
    if scene is not None:
        row["features"] = [round(float(value), 3) for value in features_of(picture[None])[0]]
        if picture.shape[-2:] == (SIZE, SIZE):
            verdicts = check_scene(picture, scene)
            row["objects"] = len(verdicts)
            row["right"] = {name: sum(getattr(v, name) for v in verdicts) for name in asdict(verdicts[0])}
    if drawn.notes:
        row["notes"] = list(drawn.notes)
    config = method.config
    return row | {"config": None if config is None else config.to_dict(), "run": plan.run}
