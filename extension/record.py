"""What a run leaves behind to be looked at: statistics of each pass, and the maps of where it merged."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from tome_sampler.session import MergeSession

MOST_MAPS = 64  # kept of a run; a map is a few kilobytes


@dataclass
class Map:
    """New pairs of the first merged layer, of the pass's first image. grid: (h, w) of its tokens. importance: (h w) or
    None. target: (tokens) the token that each token is represented by."""

    sigma: float | None
    grid: tuple[int, int]
    importance: Tensor | None
    target: Tensor


@dataclass
class PassRecord:
    """One sampling pass. aside: why it was left unmerged; empty: it was not. failed: what became of one in which
    merging failed on the way."""

    hires: bool
    session: MergeSession
    config: dict[str, Any]
    aside: str = ""
    failed: str = ""
    started: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    maps: list[Map] = field(default_factory=list)
    stats: dict[str, Any] | None = None
    _seen: int = 0

    @property
    def title(self) -> str:
        """As people are told of it."""
        return "Hires pass" if self.hires else "First pass"

    def look(self, session: MergeSession) -> None:
        """After a model call: keep the maps if new pairs were made. Nothing is read from the device."""
        if session is not self.session:  # a refiner's begins to count anew
            self.session, self._seen = session, 0
        calls = session.stats.calls
        if len(calls) <= self._seen or len(self.maps) >= MOST_MAPS:
            return
        made = any(layer.pairings_made for call in calls[self._seen :] for layer in call.layers.values())
        self._seen = len(calls)
        pairings = session.pairings()
        if not made or not pairings:
            return
        pairing = pairings[min(pairings)]
        grid = session.grid(pairing.row.shape[1])
        if grid is None:
            return
        importance = session.importance
        self.maps.append(
            Map(
                calls[-1].sigma,
                grid,
                None if importance is None else importance[0].detach().clone(),
                pairing.target[0].detach(),
            )
        )

    def finish(self, sessions: list[MergeSession]) -> None:
        """The pass is over: this is where the device is read."""
        if self.stats is None:
            self.seconds = time.perf_counter() - self.started
            found = [session.stats.to_dict() for session in sessions]
            self.stats = _joined(found) if found else MergeSession(self.session.config).stats.to_dict()
            for one in self.maps:
                one.target = one.target.cpu()
                one.importance = None if one.importance is None else one.importance.float().cpu()


@dataclass
class RunRecord:
    """A run of the host, from the click to the picture. error: the first of ours."""

    preset: str = ""
    error: str = ""
    passes: list[PassRecord] = field(default_factory=list)
    picture: Image.Image | None = None

    def keep_picture(self, picture: Any) -> None:
        """The run's first picture, to draw the maps over."""
        if isinstance(picture, Image.Image):
            self.picture = picture.copy()

    def add(self, one: PassRecord) -> None:
        """A pass starts. Forge asks twice before a hires pass, so one that made no model call gives way."""
        last = self.passes[-1] if self.passes else None
        if last is not None and last.hires == one.hires and last.stats is not None and not last.stats["steps"]:
            self.passes.pop()
        self.passes.append(one)

    @property
    def batch(self) -> list[PassRecord]:
        """The passes of the pictures that are being made, or were made last."""
        first = max((n for n, one in enumerate(self.passes) if not one.hires), default=0)
        return self.passes[first:]

    @property
    def aside(self) -> str:
        """Why nothing was merged, if no pass was; else empty."""
        if not all(one.aside for one in self.passes):
            return ""
        return "; ".join(dict.fromkeys(one.aside for one in self.passes))

    @property
    def summary(self) -> str:
        """One line for the accordion."""
        if self.aside and self.error:
            return f"Merging failed and the picture was made without it: {self.error}"
        if self.aside:
            return f"Stood aside: {self.aside}"
        done = [p for p in self.passes if p.stats is not None]
        if not done and not self.error:
            return "No run yet."
        lines = [self._merged(done)] if done else []
        lines += dict.fromkeys(f"{one.title} stood aside: {one.aside}." for one in done if one.aside)
        lines += dict.fromkeys(f"{one.title}: {one.failed}." for one in self.passes if one.failed)
        return " ".join([*lines, f"Error: {self.error}"] if self.error else lines)

    def _merged(self, done: list[PassRecord]) -> str:
        before = sum(p.stats["tokens_before"] for p in done if p.stats)
        after = sum(p.stats["tokens_after"] for p in done if p.stats)
        made = sum(p.stats["pairings_made"] for p in done if p.stats)
        reused = sum(p.stats["pairings_reused"] for p in done if p.stats)
        if not before:
            note = next((note for p in done if p.stats for note in p.stats["notes"]), None)
            if note is not None:
                return f"Last run: nothing was merged; {note}."
            return "Last run: nothing was merged, no layer has enough tokens at this size."
        share = 1 - after / before
        return f"Last run ({self.preset}): {share:.0%} of the tokens merged, pairs made {made}, reused {reused}."

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "preset": self.preset,
            "stood_aside": self.aside or None,
            "error": self.error or None,
            "summary": self.summary,
            "passes": [
                {
                    "hires": p.hires,
                    "seconds": round(p.seconds, 3),
                    "config": p.config,
                    "stood_aside": p.aside or None,
                    "failed": p.failed or None,
                    "maps": len(p.maps),
                    "statistics": p.stats,
                }
                for p in self.passes
                if p.stats is not None
            ],
        }


def _joined(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Statistics of a pass that a refiner took over: counts added up, the rest one after the other."""
    if len(found) == 1:
        return found[0]
    joined: dict[str, Any] = dict(found[0])
    for name in ("tokens_before", "tokens_after", "pairings_made", "pairings_reused"):
        joined[name] = sum(one[name] for one in found)
    joined["merged_fraction"] = 1 - joined["tokens_after"] / joined["tokens_before"] if joined["tokens_before"] else 0.0
    for name in ("seconds_matching", "seconds_merging"):
        spent = [one[name] for one in found if one[name] is not None]
        joined[name] = sum(spent) if spent else None
    joined["steps"] = [step for one in found for step in one["steps"]]
    joined["notes"] = list(dict.fromkeys(note for one in found for note in one["notes"]))
    return joined
