"""Which models of diffusers are known, and which of their transformer blocks may be merged. ``docs/families.md`` says
what was run of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

Blocks = list[tuple[str, nn.Module]]


def _all(blocks: Blocks) -> Blocks:
    return blocks


def _spatial(blocks: Blocks) -> Blocks:
    """Without the temporal layers, whose tokens are frames."""
    return [(name, block) for name, block in blocks if "motion_modules" not in name]


def _middle_half(blocks: Blocks) -> Blocks:
    """Blocks 7 .. 20 of 28: those that Wu et al. (2025) merge in PixArt. The first ones lay out the picture, the last
    ones draw its details."""
    return blocks[len(blocks) // 4 : len(blocks) * 3 // 4]


@dataclass(frozen=True)
class Family:
    """Models that are merged alike. name: for people. blocks: of all that have an ``attn1``, those to be merged."""

    name: str
    blocks: Callable[[Blocks], Blocks] = _all


FAMILIES: dict[str, Family] = {
    "UNet2DConditionModel": Family("Stable Diffusion 1.x, 2.x, SDXL"),
    "UNetMotionModel": Family("AnimateDiff", _spatial),
    "PixArtTransformer2DModel": Family("PixArt", _middle_half),
}
"""By the name of the class of the denoiser."""

_JOINT = ("SD3Transformer2DModel", "FluxTransformer2DModel")


def family_of(root: nn.Module) -> Family | None:
    """The family of a denoiser, or of the first one inside a module that wraps it; None if it is of no known one.

    Raises:
        ValueError: it is one whose attention is over text and picture together.
    """
    for module in root.modules():
        names = [kind.__name__ for kind in type(module).__mro__]
        found = next((FAMILIES[name] for name in names if name in FAMILIES), None)
        if found is not None:
            return found
        if any(name in _JOINT for name in names):
            raise ValueError(_unsupported(type(module).__name__))
    return None


def mergeable(root: nn.Module) -> Blocks:
    """The transformer blocks of a module tree that may be merged, by their names.

    Raises:
        ValueError: there is none, or the model is of an unsupported kind.
    """
    family = family_of(root)
    # asked of the dict: of a module that has none, getattr costs ten times as much
    blocks = [(name, m) for name, m in root.named_modules() if m._modules.get("attn1") is not None]
    if not blocks:
        raise ValueError(
            f"{type(root).__name__} has nothing to merge: no module in it has an attention layer named 'attn1', as "
            "the transformer blocks of ldm, sgm and diffusers U-Nets have"
        )
    return blocks if family is None else family.blocks(blocks)


def require_known(pipe: Any, root: nn.Module) -> None:
    """Say that a pipeline's denoiser is of a kind that nobody has tried.

    Raises:
        ValueError: it is a model of diffusers, and of no known family.
    """
    if family_of(root) is None and type(root).__module__.startswith("diffusers."):
        raise ValueError(f"{type(pipe).__name__}: {_unsupported(type(root).__name__)}")


def _unsupported(kind: str) -> str:
    known: Sequence[str] = sorted(FAMILIES)
    return f"merging in {kind} is unsupported; it is supported in {', '.join(known)}"
