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
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Form = Literal["mask", "channel"]

FORM: dict[str, Form] = {"cpu": "mask"}
"""How log(size) is handed over, per device: a mask where the kernel takes one cheaply (`benchmarks/attention_form.py`),
one more q/k channel elsewhere, because on CUDA a mask loses the flash kernel."""

_SOFTMAX: set[Callable[..., Any]] = {torch.softmax, Tensor.softmax, F.softmax}
_NEVER = -1e4  # the logit of padding: far below any real one, and finite in fp16


class proportional_attention(TorchFunctionMode):
    """Within it, attention over m keys adds `log_size` (b m) to their logits.

    ``used`` tells afterwards whether any attention did: one that calls neither of the two functions (xformers' own
    operators, say) cannot be reached.
    """

    def __init__(self, log_size: Tensor, form: Form | None = None) -> None:
        super().__init__()
        self.log_size = log_size.clamp(min=_NEVER)
        self.form = form or FORM.get(log_size.device.type, "channel")
        self.used = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._sdpa(*args, **kwargs)
        if func in _SOFTMAX:
            logits = args[0] if args else kwargs["input"]
            if logits.shape[-1] == self.log_size.shape[1] and logits.shape[0] % self.log_size.shape[0] == 0:
                self.used = True
                return func(logits + self._bias(logits), *args[1:], **{k: v for k, v in kwargs.items() if k != "input"})
        return func(*args, **kwargs)

    def _bias(self, like: Tensor) -> Tensor:
        """log_size in the shape of logits (b ... i m) or, heads folded into the batch, (b*heads i m)."""
        bias = self.log_size.to(like.dtype).repeat_interleave(like.shape[0] // self.log_size.shape[0], 0)
        return bias.view(bias.shape[0], *(1,) * (like.ndim - 2), -1)

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
        sdpa = F.scaled_dot_product_attention
        if key.shape[-2] != self.log_size.shape[1] or key.shape[0] % self.log_size.shape[0]:
            return sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **kwargs)
        self.used = True
        if self.form == "mask" or attn_mask is not None:
            bias = self._bias(key.transpose(-1, -2))
            if attn_mask is not None:
                mask = attn_mask if attn_mask.dtype != torch.bool else torch.where(attn_mask, 0.0, -math.inf).to(bias)
                bias = bias + mask
            return sdpa(query, key, value, bias, dropout_p, is_causal, scale=scale, **kwargs)
        d = query.shape[-1]
        scale = d**-0.5 if scale is None else scale
        bias = self._bias(key.transpose(-1, -2)).transpose(-1, -2).expand(*key.shape[:-1], 1) / scale
        width = -(d + 1) % 8
        query = F.pad(torch.cat([query, torch.ones_like(query[..., :1])], -1), (0, width))
        key = F.pad(torch.cat([key, bias], -1), (0, width))
        channels = value.shape[-1]
        value = F.pad(value, (0, max(query.shape[-1] - channels, 0)))
        return sdpa(query, key, value, None, dropout_p, is_causal, scale=scale, **kwargs)[..., :channels]
