"""Classifier-free guidance around a k-diffusion denoiser: the place that sees cond and uncond before they are mixed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tome_sampler.session import MergeSession, ModelCall


class CFGDenoiser(nn.Module):
    """``denoised = model(x, sigma, uncond=..., cond=..., cond_scale=...)``, for every ``k_diffusion`` sampler.

    It tells the session of each model call, and hands it both branches as importance for the next one.

    Args:
        inner_model: a k-diffusion denoiser, called as ``inner_model(x, sigma, cond=cond)``.
        session: the :class:`MergeSession` that ``tome_sampler.merging`` gave; None: guidance alone.
        batched: both branches in one call. False: one after the other, for half the memory, cond first. Conds of
            different shapes are always sampled so.
    """

    def __init__(self, inner_model: Any, session: MergeSession | None = None, *, batched: bool = True) -> None:
        super().__init__()
        self.inner_model = inner_model
        self.session = session
        self.batched = batched
        sigmas = getattr(inner_model, "sigmas", None)
        if session is not None and isinstance(sigmas, Tensor):
            session.know_table(sorted(sigmas.tolist(), reverse=True))

    def __getattr__(self, name: str) -> Any:
        """``sigmas``, ``get_sigmas``, ``sigma_min`` and whatever else the inner model has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inner_model":
                raise
            return getattr(self.inner_model, name)

    def forward(self, x: Tensor, sigma: Tensor, uncond: Any, cond: Any, cond_scale: float) -> Tensor:
        """The guided estimate of the clean sample, in the shape of x (b c h w), or of clips (b c frames h w).

        Args:
            sigma: noise levels (b,).
            uncond: conditioning, a tensor (b ...) or a dict, list or tuple of such; None: no guidance.
            cond: likewise, or a list of (conditioning, weight) pairs, whose guidances are added up (without an
                uncond: their weighted mean).
            cond_scale: guidance scale; at 1 a single cond of weight 1 is sampled alone. Without guidance there is no
                importance.

        Raises:
            ValueError: a conditioning is not of x's batch, or the weights add up to 0 without an uncond.
        """
        conds = cond if _is_weighted(cond) else [(cond, 1.0)]
        if uncond is None and sum(weight for _, weight in conds) == 0:
            raise ValueError("the weights of cond add up to 0; without an uncond their sum must be another number")
        guided = uncond is not None and (cond_scale != 1 or [weight for _, weight in conds] != [1])
        parts = [c for c, _ in conds] + ([uncond] if guided else [])
        for part in parts:
            _check_batch(part, x.shape[0])
        branches = ["cond"] * len(conds) + ["uncond"] * guided
        out = self._model(x, sigma, parts, branches)
        if not guided:
            total = sum(weight for _, weight in conds)
            return torch.stack([o * (w / total) for o, (_, w) in zip(out, conds, strict=True)]).sum(0)
        base = out[-1]
        guidance = sum((o - base) * w for o, (_, w) in zip(out, conds, strict=False))
        if self.session is not None:
            self.session.observe(base + guidance, base)
        denoised: Tensor = base + guidance * cond_scale
        return denoised

    def _model(self, x: Tensor, sigma: Tensor, parts: Sequence[Any], branches: Sequence[str]) -> list[Tensor]:
        if len(parts) > 1 and self.batched and len({_shapes(part) for part in parts}) == 1:
            # uncond first, as k-diffusion's own scripts have it
            order = [len(parts) - 1, *range(len(parts) - 1)] if branches[-1] == "uncond" else [*range(len(parts))]
            batch = _concatenate([parts[i] for i in order])
            out = self._call(torch.cat([x] * len(parts)), sigma.repeat(len(parts)), batch, [branches[i] for i in order])
            chunks = dict(zip(order, out.chunk(len(parts)), strict=True))
            return [chunks[i] for i in range(len(parts))]
        one_by_one = enumerate(zip(parts, branches, strict=True))
        return [self._call(x, sigma, part, [branch], further=i > 0) for i, (part, branch) in one_by_one]

    def _call(self, x: Tensor, sigma: Tensor, cond: Any, branches: Sequence[str], further: bool = False) -> Tensor:
        if self.session is None:
            out: Tensor = self.inner_model(x, sigma, cond=cond)
            return out
        size = (x.shape[-2], x.shape[-1])
        images = x.shape[0] // len(branches) * (x.shape[2] if x.ndim == 5 else 1)
        with self.session.call(ModelCall.chunked(float(sigma.max()), size, branches, images, further)):
            out = self.inner_model(x, sigma, cond=cond)
        return out


def _is_weighted(cond: Any) -> bool:
    return (
        isinstance(cond, list)
        and bool(cond)
        and all(isinstance(c, tuple) and len(c) == 2 and isinstance(c[1], (int, float)) for c in cond)
    )


def _leaves(cond: Any) -> list[Tensor]:
    if isinstance(cond, Tensor):
        return [cond]
    children = cond.values() if isinstance(cond, dict) else cond if isinstance(cond, (list, tuple)) else ()
    return [leaf for child in children for leaf in _leaves(child)]


def _shapes(cond: Any) -> tuple[torch.Size, ...]:
    return tuple(leaf.shape for leaf in _leaves(cond))


def _check_batch(cond: Any, b: int) -> None:
    for leaf in _leaves(cond):
        if leaf.ndim == 0 or leaf.shape[0] != b:
            raise ValueError(
                f"a conditioning has the shape {tuple(leaf.shape)} and x has {b} images; its first size must be {b}"
            )


def _concatenate(conds: Sequence[Any]) -> Any:
    """Conditionings of the same structure, as one batch."""
    first = conds[0]
    if isinstance(first, Tensor):
        return torch.cat(list(conds))
    if isinstance(first, dict):
        return {key: _concatenate([c[key] for c in conds]) for key in first}
    if isinstance(first, (list, tuple)):
        return type(first)(_concatenate(list(parts)) for parts in zip(*conds, strict=True))
    return first
