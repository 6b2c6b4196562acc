"""Measure: the txt2img settings as they stand, sampled plain and merged with the same seed."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from modules import processing, scripts, shared
from modules.call_queue import queue_lock
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from .fields import TITLE

SETTINGS = {  # the page's elem_id: StableDiffusionProcessing's argument
    "txt2img_prompt": "prompt",
    "txt2img_neg_prompt": "negative_prompt",
    "txt2img_sampling": "sampler_name",
    "txt2img_scheduler": "scheduler",
    "txt2img_steps": "steps",
    "txt2img_width": "width",
    "txt2img_height": "height",
    "txt2img_cfg_scale": "cfg_scale",
    "txt2img_distilled_cfg_scale": "distilled_cfg_scale",
    "txt2img_seed": "seed",
}


@dataclass
class Measured:
    """seconds: of sampling and decoding, the median of the runs."""

    plain: Image.Image
    merged: Image.Image
    seconds_plain: float
    seconds_merged: float
    summary: str

    @property
    def fidelity(self) -> tuple[float, float]:
        """PSNR in dB (at most 99, for equal pictures) and SSIM of the merged picture to the plain one."""
        a, b = np.asarray(self.plain.convert("RGB")), np.asarray(self.merged.convert("RGB"))
        if np.array_equal(a, b):
            return 99.0, 1.0
        return float(peak_signal_noise_ratio(a, b)), float(structural_similarity(a, b, channel_axis=2))


def measure(
    settings: Mapping[str, Any], controls: list[Any], runs: int, summary: Callable[[], str]
) -> Iterator[tuple[float, str] | Measured]:
    """Progress in 0 .. 1 with a word on what is being done, and at last what was measured.

    Plain and merged take turns after a short run of each that is not counted. A generator, so that the page shows it.

    Args:
        settings: arguments of the host's processing.
        controls: the accordion's values, for the merged runs.
    """
    values = dict(settings)
    seed = values.get("seed", -1)
    values["seed"] = processing.get_fixed_seed(int(seed) if seed not in (None, "") else -1)
    warm = {**values, "steps": 2}
    plan = [("warming up", warm, False), ("warming up", warm, True)]
    plan += [
        (f"{'merged' if on else 'plain'} {n + 1} of {runs}", values, on) for n in range(runs) for on in (False, True)
    ]
    pictures: dict[bool, Image.Image] = {}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    line = ""
    for n, (word, arguments, on) in enumerate(plan):
        job = _Job(arguments, [on, *controls[1:]])
        while not job.wait(0.4):
            steps = max(int(arguments.get("steps", 1)), 1)
            yield (n + min(shared.state.sampling_step / steps, 1)) / len(plan), word
        pictures[on] = job.picture
        if arguments is values:
            seconds[on].append(job.seconds)
            line = summary() if on else line
    yield Measured(
        pictures[False], pictures[True], statistics.median(seconds[False]), statistics.median(seconds[True]), line
    )


class _Job:
    """One generation, in a thread of its own (Forge: in its main thread), queued as the host queues all of them."""

    def __init__(self, arguments: Mapping[str, Any], controls: list[Any]) -> None:
        self._arguments, self._controls = arguments, controls
        self._error: BaseException | None = None
        self._picture: Image.Image | None = None
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether it is done; an error in it is raised here."""
        self._thread.join(seconds)
        if self._error is not None:
            raise RuntimeError(f"the generation failed: {self._error}") from self._error
        return not self._thread.is_alive()

    @property
    def picture(self) -> Image.Image:
        if self._picture is None:
            raise RuntimeError("the generation was interrupted or gave no picture")
        return self._picture

    def _run(self) -> None:
        try:
            try:
                from modules_forge.main_thread import run_and_wait_result
            except ImportError:
                self._generate()
            else:
                run_and_wait_result(self._generate)
        except BaseException as error:
            self._error = error

    def _generate(self) -> None:
        with queue_lock:
            shared.state.begin(job="tome-sampler measure")
            try:
                p = processing.StableDiffusionProcessingTxt2Img(
                    sd_model=shared.sd_model, do_not_save_samples=True, do_not_save_grid=True, **self._arguments
                )
                p.is_api = True  # or the host's own seed and sampler scripts write their controls' defaults over ours
                p.scripts = scripts.scripts_txt2img
                p.script_args = _script_args(p.scripts, self._controls)
                started = time.perf_counter()
                try:
                    found = processing.process_images(p)
                finally:
                    p.close()
                self.seconds = time.perf_counter() - started
                if not shared.state.interrupted and found.images:
                    self._picture = found.images[found.index_of_first_image]
            finally:
                shared.state.end()


def _script_args(runner: Any, controls: list[Any]) -> tuple[Any, ...]:
    """Every script at its controls' defaults, ours as given."""
    args: list[Any] = [0] * max([1, *(script.args_to or 1 for script in runner.scripts)])
    for script in runner.scripts:
        found = getattr(script, "controls", None) or []
        if script.args_from is not None and script.args_to is not None:
            values = [getattr(component, "value", None) for component in found]
            args[script.args_from : script.args_to] = controls if script.title() == TITLE else values
    return tuple(args)
