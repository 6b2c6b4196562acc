"""A tiny model in the shape of ldm's U-Net: module and argument names, einsum and softmax attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CrossAttention(nn.Module):
    def __init__(self, channels: int, context: int | None = None, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context or channels, channels, bias=False)
        self.to_v = nn.Linear(context or channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (self._split(y) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        logits = torch.einsum("b i d, b j d -> b i j", q, k) * q.shape[-1] ** -0.5
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, :].repeat_interleave(self.heads, 0), -1e9)
        out = torch.einsum("b i j, b j d -> b i d", logits.softmax(dim=-1), v)
        return self.to_out(out.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2))

    def _split(self, y: Tensor) -> Tensor:
        return y.unflatten(2, (self.heads, -1)).transpose(1, 2).flatten(0, 1)  # (b n h*d) as (b*h n d)


class Unreachable(CrossAttention):
    """Attention whose kernel calls neither function, as xformers' does."""

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        q, k, v = (self._split(y) for y in (self.to_q(x), self.to_k(x), self.to_v(x)))
        weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).exp()
        out = weights / weights.sum(-1, keepdim=True) @ v
        return self.to_out(out.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2))


class BasicTransformerBlock(nn.Module):
    def __init__(self, channels: int, context: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(channels)
        self.ff = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))
        self.attn2 = CrossAttention(channels, context)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x


class LdmUNet(nn.Module):
    """Blocks on the full resolution and, `deep`, on the half one; `shallow` False leaves the full one without."""

    def __init__(self, channels: int = 16, context: int = 8, shallow: bool = True) -> None:
        super().__init__()
        self.inwards = nn.Conv2d(4, channels, 3, padding=1)
        self.first = BasicTransformerBlock(channels, context) if shallow else None
        self.deep = BasicTransformerBlock(channels, context)
        self.last = BasicTransformerBlock(channels, context) if shallow else None
        self.outwards = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.inwards(x) + timesteps.view(-1, 1, 1, 1) / 1000
        h = _on_tokens(self.first, h, context)
        low = _on_tokens(self.deep, F.avg_pool2d(h, 2, ceil_mode=True), context)
        h = h + F.interpolate(low, h.shape[-2:], mode="nearest")
        return self.outwards(_on_tokens(self.last, h, context))


def _on_tokens(block: nn.Module | None, h: Tensor, context: Tensor | None) -> Tensor:
    return h if block is None else block(h.flatten(2).transpose(1, 2), context).transpose(1, 2).view_as(h)
