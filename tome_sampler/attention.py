"""Proportional attention: a merged key counts for as many tokens as it stands for.

A key that stands for k tokens but counts once is what token merging loses most by; log(k) on its logits makes the
attention over exact duplicates exact (Bolya et al. 2023, ToMe for ViT, section 3.2). It joins the logits where the
module forms them, inside any attention that calls torch's ``scaled_dot_product_attention`` or ``softmax``: no forward
is copied, and LoRA, processors and kernels stay as the host has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Form = Literal["mask", "channel"]

FORM: dict[str, Form] = {"cpu": "mask"}
"""How log(size) is handed over, per device: a mask where the kernel takes one cheaply (`benchmarks/attention_form.py`),
one more q/k channel elsewhere, because on CUDA a mask loses the flash kernel."""

_SDPA: Callable[..., Tensor] = torch._C._nn.scaled_dot_product_attention
"""Torch's own. What ``torch.nn.functional`` has by that name may be another kernel (SageAttention's way in), which adds
nothing to its logits."""
_SOFTMAX: set[Callable[..., Any]] = {torch.softmax, Tensor.softmax, F.softmax}
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")
_PLAIN_PROCESSORS = {
    *("AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0", "SlicedAttnProcessor"),
    *("XFormersAttnProcessor", "AttnProcessorNPU", "XLAFlashAttnProcessor2_0"),
    "NoneType",  # a layer of another library
}
"""diffusers' processors that attend from all tokens of a layer to all of them, and do nothing else."""
_NEVER = -1e4  # the logit of padding: far below any real one, and finite in fp16


class proportional_attention(TorchFunctionMode):
    """Within it, attention over m keys adds `log_size` (b m) to their logits.

    `heads`, if known, says that logits with the heads folded into the batch have b * heads rows; fewer are then taken
    for a slice, of slices worked off in order, as memory-saving attention does. So are fewer batch rows: guidance by
    perturbed attention and reference attention treat some of them apart.

    `tokens` (b m c), if given, are the merged tokens themselves. Keys made of them and of others after them, put
    together by ``torch.cat`` as reference attention does, are then known: the others count once each.

    ``used`` tells afterwards whether any attention did: one that calls neither of the two functions (xformers' own
    operators, say) cannot be reached, see :func:`own_attention`.
    """

    def __init__(
        self, log_size: Tensor, form: Form | None = None, heads: int | None = None, tokens: Tensor | None = None
    ) -> None:
        super().__init__()
        self.log_size = log_size.clamp(min=_NEVER)
        self.form = form or FORM.get(log_size.device.type, "channel")
        self.heads = heads
        self.used = False
        self._tokens = tokens
        self._lengths = {log_size.shape[1]}  # of keys that are the merged tokens, or begin with them
        self._done = 0  # folded rows of the slices so far

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _SDPA:
            return self._sdpa(*args, **kwargs)
        if func in _SOFTMAX:
            logits = args[0] if args else kwargs["input"]
            bias = self._bias(logits)
            if bias is not None:
                self.used = True
                return func(logits + bias, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"})
        out = func(*args, **kwargs)
        if func is torch.cat and self._tokens is not None:
            self._joined(args[0] if args else kwargs["tensors"], out)
        return out

    def _joined(self, parts: Any, whole: Tensor) -> None:
        """Tensors were put together: are they the merged tokens, or some rows of them, and others after those?"""
        first, tokens = parts[0], self._tokens
        if tokens is None or first.ndim != 3 or first.shape[1:] != tokens.shape[1:] or whole.shape[0] != first.shape[0]:
            return
        if first.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr():
            self._lengths.add(whole.shape[1])

    def _bias(self, logits: Tensor) -> Tensor | None:
        """log_size in the shape of logits (b ... i m) or, heads folded into the batch, (b*heads i m) or a slice of
        its rows; None if they are something else's."""
        b, m = self.log_size.shape
        rows, more = logits.shape[0], logits.shape[-1] - m
        if logits.ndim < 3 or logits.shape[-1] not in self._lengths:
            return None
        bias = self.log_size.to(logits.dtype)
        if more:
            bias = F.pad(bias, (0, more))
        if logits.ndim > 3 or (self.heads is None and rows == b):
            heads = 1
        else:
            heads = self.heads or rows // b
            if self.heads is None and rows % b:
                return None
            bias = bias.repeat_interleave(heads, 0)
        if rows > b * heads:
            return None
        if rows < b * heads:
            first, self._done = self._done, (self._done + rows) % (b * heads)
            if first + rows > b * heads:
                return None
            bias = bias[first : first + rows]
        return bias.view(rows, *(1,) * (logits.ndim - 2), -1)

    def _sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        bias = self._bias(key.transpose(-1, -2))
        if bias is None:
            return _SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **kwargs)
        self.used = True
        form = self.form
        if attn_mask is not None:
            mask = attn_mask if attn_mask.dtype != torch.bool else torch.where(attn_mask, 0.0, -math.inf).to(bias)
            bias, form = bias + mask, "mask"
        return _biased_attention(query, key, value, bias, form, dropout_p, is_causal, scale, **kwargs)


def own_attention(module: nn.Module, x: Tensor, log_size: Tensor) -> Tensor | None:
    """Self-attention of x (b m c) by a layer's own projections, keys counted by `log_size` (b m): for hosts whose
    attention :class:`proportional_attention` cannot reach. The projections are called as modules, so that LoRA acts.

    None if the layer is not a plain one, with ``to_q``, ``to_k``, ``to_v``, ``to_out`` and ``heads``.
    """
    if not has_own_attention(module):
        return None
    heads: Any = module.heads
    to_q, to_k, to_v, to_out = [getattr(module, name) for name in _PROJECTIONS]
    q, k, v = (rearrange(to(x), "b m (h d) -> b h m d", h=heads) for to in (to_q, to_k, to_v))
    out = counted_attention(q, k, v, log_size, getattr(module, "scale", None))
    out = rearrange(out, "b h m d -> b m (h d)")
    for part in to_out if isinstance(to_out, (nn.ModuleList, nn.Sequential)) else [to_out]:
        out = part(out)
    return out


def has_own_attention(module: nn.Module) -> bool:
    """Whether a layer is one that :func:`own_attention` can stand in for."""
    special = ("group_norm", "spatial_norm", "norm_q", "norm_k", "residual_connection")
    return (
        isinstance(getattr(module, "heads", None), int)
        and type(getattr(module, "processor", None)).__name__ in _PLAIN_PROCESSORS
        and all(isinstance(getattr(module, name, None), nn.Module) for name in _PROJECTIONS)
        and not any(getattr(module, name, None) for name in special)
        and getattr(module, "rescale_output_factor", 1) == 1
    )


def counted_attention(
    query: Tensor, key: Tensor, value: Tensor, log_size: Tensor, scale: float | None = None
) -> Tensor:
    """Attention (b heads i d) over m keys, whose logits gain `log_size` (b m)."""
    bias = log_size.clamp(min=_NEVER).to(query.dtype)[:, None, None]
    return _biased_attention(query, key, value, bias, FORM.get(query.device.type, "channel"), scale=scale)


def _biased_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    form: Form,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention whose logits gain bias (b ... 1 m), as a mask or as one more channel of query and key."""
    if form == "mask":
        return _SDPA(query, key, value, bias, dropout_p, is_causal, scale=scale, **kwargs)
    d = query.shape[-1]
    scale = d**-0.5 if scale is None else scale
    # half the range: padding must stay finite in fp16, also in a kernel that adds the other channels to it
    most = torch.finfo(key.dtype).max / 2
    bias = (bias.transpose(-1, -2).float() / scale).clamp(-most, most).to(key.dtype).expand(*key.shape[:-1], 1)
    width = -(d + 1) % 8
    query = F.pad(torch.cat([query, torch.ones_like(query[..., :1])], -1), (0, width))
    key = F.pad(torch.cat([key, bias], -1), (0, width))
    channels = value.shape[-1]
    value = F.pad(value, (0, max(query.shape[-1] - channels, 0)))
    return _SDPA(query, key, value, None, dropout_p, is_causal, scale=scale, **kwargs)[..., :channels]
