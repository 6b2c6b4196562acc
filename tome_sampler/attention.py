"""Proportional attention: a merged key counts for as many tokens as it stands for.

A key that stands for k tokens but counts once is what token merging loses most by; log(k) on its logits makes the
attention over exact duplicates exact (Bolya et al. 2023, ToMe for ViT, section 3.2). It joins the logits where the
module forms them, inside any attention that calls torch's ``scaled_dot_product_attention`` or ``softmax``: no forward
is copied, and LoRA, processors and kernels stay as the host has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Form = Literal["mask", "channel"]

FORM: dict[str, Form] = {"cpu": "mask" if torch.__version__ >= "2.3" else "channel"}
"""How log(size) is handed over, per device: a mask where the kernel takes one cheaply (`benchmarks/attention_form.py`),
one more q/k channel elsewhere: with a mask CUDA loses its flash kernel, and so does a CPU with a torch before 2.3."""

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
_PIECE, _MOST_PIECES = 1 << 17, 64  # logits that are worth working off piece by piece, in a few launches
_NEVER = -1e4  # the logit of padding: far below any real one, and finite in fp16


class _Place(NamedTuple):
    """Logits whose keys are merged ones, of `dims` dimensions. folded: heads that are rows of the batch, else 1.
    first, last: the slice of all such rows that they are. more: keys after the merged ones."""

    dims: int = 4
    folded: int = 1
    first: int = 0
    last: int | None = None
    more: int = 0


class KeyBias:
    """What the logits of m keys gain in proportional attention, and what kernels take of that. Each form is made once,
    for all steps that keep the pairs: a few tiny kernels in every layer would cost a GPU more than merging does.

    values: (b m), fp32; -inf for padding.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._forms: dict[tuple[Any, ...], Tensor] = {}

    @property
    def kept(self) -> list[Tensor]:
        """All tensors that it holds by now."""
        return [self.values, *self._forms.values()]

    def mask(self, dtype: torch.dtype, place: _Place) -> Tensor:
        """What is added to logits: (rows ... 1 m+more)."""
        form = (dtype, place)
        if form not in self._forms:
            self._forms[form] = self._at(place).to(dtype)
        return self._forms[form]

    def channels(self, dtype: torch.dtype, place: _Place, scale: float, width: int) -> Tensor:
        """What is appended to keys: (rows ... m+more width). The first channel, where queries have ones, adds to the
        logits, which a kernel multiplies by `scale`; the others are 0."""
        form = (dtype, place, scale, width)
        if form not in self._forms:
            # half the range: padding must stay finite in fp16, also in a kernel that adds the other channels to it
            most = torch.finfo(dtype).max / 2
            first = (self._at(place).transpose(-1, -2) / scale).clamp(-most, most).to(dtype)
            self._forms[form] = F.pad(first, (0, width - 1))
        return self._forms[form]

    def _at(self, place: _Place) -> Tensor:
        bias = F.pad(self.values.clamp(min=_NEVER), (0, place.more))
        bias = bias.repeat_interleave(place.folded, 0)[place.first : place.last]
        return bias[(slice(None), *(None,) * (place.dims - 2))]


class proportional_attention(TorchFunctionMode):
    """Within it, attention over m keys adds `bias` (b m) to their logits.

    `heads`, if known, says that logits with the heads folded into the batch have b * heads rows; fewer are then taken
    for a slice, of slices worked off in order, as memory-saving attention does. So are fewer batch rows: guidance by
    perturbed attention and reference attention treat some of them apart.

    `tokens` (b m c), if given, are the merged tokens themselves. Keys made of them and of others after them, put
    together by ``torch.cat`` as reference attention does, are then known: the others count once each.

    ``used`` tells afterwards whether any attention did: one that calls neither of the two functions (xformers' own
    operators, say) cannot be reached, see :func:`own_attention`.
    """

    def __init__(
        self, bias: KeyBias, form: Form | None = None, heads: int | None = None, tokens: Tensor | None = None
    ) -> None:
        super().__init__()
        self.bias = bias
        self.form = form or FORM.get(bias.values.device.type, "channel")
        self.heads = heads
        self.used = False
        self._tokens = tokens
        self._lengths = {bias.values.shape[1]}  # of keys that are the merged tokens, or begin with them
        self._done = 0  # folded rows of the slices so far

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _SDPA:
            return self._sdpa(*args, **kwargs)
        if func in _SOFTMAX:
            logits = args[0] if args else kwargs["input"]
            place = self._place(logits)
            if place is not None:
                self.used = True
                rest = args[1:], {k: v for k, v in kwargs.items() if k != "input"}
                return _biased_softmax(func, logits, self.bias.mask(logits.dtype, place), *rest)
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

    def _place(self, logits: Tensor) -> _Place | None:
        """Where logits (b ... i m) or, heads folded into the batch, (b*heads i m) or a slice of their rows, have their
        keys; None if they are something else's."""
        b, m = self.bias.values.shape
        rows, more = logits.shape[0], logits.shape[-1] - m
        if logits.ndim < 3 or logits.shape[-1] not in self._lengths:
            return None
        if logits.ndim > 3 or (self.heads is None and rows == b):
            heads = 1
        else:
            heads = self.heads or rows // b
            if self.heads is None and rows % b:
                return None
        if rows > b * heads:
            return None
        first = 0
        if rows < b * heads:
            first, self._done = self._done, (self._done + rows) % (b * heads)
            if first + rows > b * heads:
                return None
        return _Place(logits.ndim, heads, first, first + rows, more)

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
        place = self._place(key.transpose(-1, -2))
        if place is not None:
            self.used = True
            if attn_mask is None:
                rest = dropout_p, is_causal, scale
                return _biased_attention(query, key, value, self.bias, place, self.form, *rest, **kwargs)
            bias = self.bias.mask(key.dtype, place)
            mask = attn_mask if attn_mask.dtype != torch.bool else torch.where(attn_mask, 0.0, -math.inf).to(bias)
            attn_mask = bias + mask
        return _SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **kwargs)


def _biased_softmax(
    func: Callable[..., Any], logits: Tensor, mask: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """func(logits + mask), some queries at a time where there is much of it: the sum of all would be a third tensor of
    that size beside logits and result, and where few keys are merged more memory than without."""
    dim = args[0] if args else kwargs.get("dim")
    pieces = min(_MOST_PIECES, logits.numel() // _PIECE)
    if pieces < 2 or dim not in (-1, logits.ndim - 1) or kwargs.get("out") is not None:
        return func(logits + mask, *args, **kwargs)  # type: ignore[no-any-return]
    out: Tensor | None = None
    for number, part in enumerate(logits.tensor_split(pieces, -2)):
        weights: Tensor = func(part + mask, *args, **kwargs)
        out = weights.new_empty(logits.shape) if out is None else out
        out.tensor_split(pieces, -2)[number].copy_(weights)
        del weights  # before the next sum
    assert out is not None
    return out


def own_attention(module: nn.Module, x: Tensor, bias: KeyBias) -> Tensor | None:
    """Self-attention of x (b m c) by a layer's own projections, keys counted by `bias` (b m): for hosts whose
    attention :class:`proportional_attention` cannot reach. The projections are called as modules, so that LoRA acts.

    None if the layer is not a plain one, with ``to_q``, ``to_k``, ``to_v``, ``to_out`` and ``heads``.
    """
    if not has_own_attention(module):
        return None
    heads: Any = module.heads
    to_q, to_k, to_v, to_out = [getattr(module, name) for name in _PROJECTIONS]
    q, k, v = (rearrange(to(x), "b m (h d) -> b h m d", h=heads) for to in (to_q, to_k, to_v))
    out = counted_attention(q, k, v, bias, getattr(module, "scale", None))
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


def counted_attention(query: Tensor, key: Tensor, value: Tensor, bias: KeyBias, scale: float | None = None) -> Tensor:
    """Attention (b heads i d) over m keys, whose logits gain `bias` (b m)."""
    form = FORM.get(query.device.type, "channel")
    return _biased_attention(query, key, value, bias, _Place(), form, scale=scale)


def _biased_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: KeyBias,
    place: _Place,
    form: Form,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention whose logits gain a bias, as a mask or as more channels of query and key, whose width stays one that
    fused kernels take."""
    if form == "mask":
        mask = bias.mask(key.dtype, place)
        return _SDPA(query, key, value, mask, dropout_p, is_causal, scale=scale, **kwargs)
    d, channels = query.shape[-1], value.shape[-1]
    scale = d**-0.5 if scale is None else scale
    width = 1 + -(d + 1) % 8
    more = bias.channels(key.dtype, place, scale, width)
    query = F.pad(query, (0, width), value=1.0)
    key = torch.cat([key, more.expand(*key.shape[:-1], width)], -1)
    value = F.pad(value, (0, max(d + width - channels, 0)))
    return _SDPA(query, key, value, None, dropout_p, is_causal, scale=scale, **kwargs)[..., :channels]
