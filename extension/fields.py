"""One table of what can be set. It drives the controls, the infotext, pasting, the X/Y/Z axes and the API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tome_sampler.config import MODULES, MergeConfig
from tome_sampler.refresh import CA_TOME_CHECKPOINTS
from tome_sampler.spelling import read_refresh, refresh_text

TITLE = "ToMe Sampler"
PRESETS = {  # as the page names them: the library's name
    "Quality": "quality",
    "Balanced": "balanced",
    "Fast": "fast",
    "ToMe-SD": "tomesd",
    "CA-ToMe": "ca_tome",
    "Importance": "importance",
}
OFF, CUSTOM = "Off", "Custom"


@dataclass(frozen=True)
class Field:
    """A setting. name: the field of ``MergeConfig``. kind: "number", "whole", "flag", "choice", "choices",
    "optional choices", "refresh", "threshold", "optional" or "tokens". low, high, step: the control's; a whole or plain
    number may not be outside them."""

    name: str
    label: str
    kind: str
    info: str
    low: float = 0.0
    high: float = 1.0
    step: float = 0.01
    choices: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """In the infotext."""
        return f"ToMe {self.name.replace('_', ' ')}"

    @property
    def nullable(self) -> bool:
        """Whether None is a value: off."""
        return self.kind in ("threshold", "optional", "optional choices")

    @property
    def several(self) -> bool:
        """Whether a value is some of the choices."""
        return self.kind in ("choices", "optional choices")

    def shown(self, config: MergeConfig) -> Any:
        """What the control shows."""
        value = getattr(config, self.name)
        if self.kind == "threshold":
            return 0.0 if value is None else max(value, 0.0)
        if self.kind in ("refresh", "optional", "tokens"):
            return self.text(config)
        return list(value or ()) if self.several else value

    def read(self, value: Any) -> Any:
        """The configuration's value, from a control, a caller or (text) an infotext or axis.

        Raises:
            ValueError: one line that names the value and what it may be.
        """
        if isinstance(value, str) and self.kind not in ("choice", "choices", "refresh"):
            value = self._from_text(value)
        if self.kind == "flag":
            if not isinstance(value, bool):
                raise ValueError(f"{self.name} is {value!r}; it must be true or false")
            return value
        if self.kind == "choice":
            if value not in self.choices:
                raise ValueError(f"{self.name} is {value!r}; it must be one of {', '.join(self.choices)}")
            return value
        if self.several:
            if self.nullable and (value is None or value == []):  # no box is ticked
                return None
            if isinstance(value, str):
                value = [part.strip() for part in value.replace("+", ",").split(",") if part.strip()]
            if not isinstance(value, (list, tuple)) or not value or any(v not in self.choices for v in value):
                other = ", or be null: as later" if self.nullable else ""
                raise ValueError(
                    f"{self.name} is {value!r}; it must name at least one of {', '.join(self.choices)}{other}"
                )
            return tuple(v for v in self.choices if v in value)
        if self.kind == "refresh":
            return read_refresh(value)
        if self.kind == "threshold" and value == 0 and not isinstance(value, bool):
            return None  # its slider's way to say so: from 0 on every pair is alike enough
        if self.nullable and value is None:
            return None
        if self.kind == "tokens" and value == "auto":
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{self.name} is {value!r}; it must be a number{self._range()}")
        if self.kind in ("whole", "tokens"):
            if value != value or abs(value) == float("inf") or value != int(value):
                raise ValueError(f"{self.name} is {value!r}; it must be a whole number{self._range()}")
            value = int(value)
        low = -1.0 if self.kind == "threshold" else self.low
        if not low <= value <= self.high:
            raise ValueError(f"{self.name} is {value!r}; it must be a number{self._range()}")
        return value

    def text(self, config: MergeConfig) -> str:
        """In the infotext; :meth:`read` takes it back."""
        value = getattr(config, self.name)
        if self.kind == "refresh":
            return refresh_text(value)
        if self.several and value is not None:
            return "+".join(value)
        if isinstance(value, float):
            return repr(float(value)).removesuffix(".0")  # every digit, or another picture would come of it
        return "off" if value is None else str(value)

    def _range(self) -> str:
        low = -1.0 if self.kind == "threshold" else self.low
        other = ", or null for off" if self.nullable else ", or 'auto'" if self.kind == "tokens" else ""
        return f" from {low:g} to {self.high:g}{other}"

    def _from_text(self, text: str) -> Any:
        text = text.strip()
        if self.nullable and text.lower() in ("off", "none", ""):
            return None
        if self.kind == "flag":
            return {"true": True, "false": False}.get(text.lower(), text)
        if self.kind == "tokens" and text.lower() == "auto":
            return "auto"
        try:
            return float(text)
        except ValueError:
            return text


FIELDS: tuple[Field, ...] = (
    Field("ratio", "Merge ratio", "number", "share of tokens merged away; 2x2 cells allow 0.75, stride 4 allows 0.9375",
          high=0.9375),
    Field("threshold", "Similarity threshold", "threshold",
          "merge only tokens at least this alike, up to the ratio; 0: always the whole ratio"),
    Field("importance", "Importance strength", "number",
          "how much more alike an important token must be to be merged", high=2.0),
    Field("refresh", "Pair reuse", "refresh", "when pairs are made anew: more rarely is faster",
          choices=("always", "sigma ratio 2", "sigma ratio 3", "sigma ratio 4", "sigma ratio 6", "every 5 steps",
                   "drift 0.05", *(f"checkpoints {name}" for name in CA_TOME_CHECKPOINTS), "once")),
    Field("levels", "Attention levels", "whole", "how many of the finest levels are merged", low=1, high=4, step=1),
    Field("start", "Start at", "number", "fraction of the noise schedule from which to merge"),
    Field("end", "End at", "number", "fraction of the noise schedule up to which to merge"),
    Field("floor", "Least merged", "number",
          "with a threshold: the share that is merged in any case, where that pays", high=0.9375),
    Field("stride", "Cell size (stride)", "whole",
          "one destination per stride x stride cell; in the early part as large as it needs", low=2, high=8, step=1),
    Field("destinations", "Destinations", "choice", "which token of a cell the others may join",
          choices=("cell", "grid", "pool")),
    Field("random", "Random destinations", "flag", "draw the token of a grid cell by the merge seed"),
    Field("pool", "Pool size", "number", "destinations 'pool': in multiples of the kept tokens", low=0.25, high=4.0,
          step=0.05),
    Field("protect", "Protect", "number", "share of tokens, the most important ones, that are never merged"),
    Field("search", "Search", "choice", "'local': only destinations in neighbouring cells",
          choices=("global", "local")),
    Field("neighbourhood", "Neighbourhood", "whole", "cells in each direction for the local search", low=1, high=8,
          step=1),
    Field("metric", "Similarity of", "choice", "what the attention gets, or its block; or nearness in the picture",
          choices=("attention", "block", "position")),
    Field("batch_rule", "Batch rule", "choice", "'row': an image merges the same alone or in a batch",
          choices=("row", "max")),
    Field("share_branches", "Share between cond and uncond", "flag", "match once for both"),
    Field("share_layers", "Share between layers", "flag", "match once for all layers of a level"),
    Field("modules", "Merge in", "choices", "which parts of a transformer block; Forge: attn1 or block only",
          choices=MODULES),
    Field("prune_until", "Prune until", "number", "up to this fraction tokens are dropped and not averaged"),
    Field("proportional", "Proportional attention", "flag", "a merged key counts for as many tokens as it stands for"),
    Field("min_tokens", "Smallest layer", "tokens",
          "layers with fewer tokens are left alone; auto: those where it would not pay; 0: none", low=0, high=65536,
          choices=("auto", "0", "1024", "4096")),
    Field("seed", "Merge seed", "whole", "of random destinations; the picture's seed is never touched", low=0,
          high=2**31 - 1, step=1),
    # a dropdown and not a slider that ends in off: 0 is a value of its own, nothing merged early
    Field("early_ratio", "Early ratio", "optional",
          "share merged while the picture is mostly noise, whatever the threshold; off: as later", high=0.99,
          choices=("off", "0.5", "0.75", "0.9")),
    Field("early_sigma", "Early until sigma", "number",
          "the noise level where the early part ends; runs fall from about 15 to 0", low=0.1, high=15.0, step=0.1),
    Field("early_modules", "Early merge in", "optional choices",
          "which parts in the early part, none: as later; 'block' is faster and less exact", choices=MODULES),
)  # fmt: skip
"""In the order of callers' positional arguments, so new ones come last."""
BY_NAME = {field.name: field for field in FIELDS}
MAIN = ("ratio", "early_ratio", "threshold", "importance", "refresh", "levels", "start", "end")
"""What the page shows at once, in that order; the others are in the Advanced fold."""
HIRES = ("ratio", "stride", "threshold", "levels", "floor", "early_ratio")
"""The fields that the hires override has controls for; the others share one, in words."""
