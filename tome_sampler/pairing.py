"""Which tokens go together: plain index data, made once and applied to many tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from tome_sampler.attention import KeyBias

_BAGS = ("cpu", "cuda")
"""Devices where an embedding bag is the weighted sum of each row's tokens in one pass: one read of the tokens and one
write of the merged ones, sums in fp32, in a fixed order. Others use ``index_add_``."""


@dataclass(frozen=True, eq=False)
class Pairing:
    """A merged sequence of m rows for n tokens, for each of b batch rows.

    row: (b n) the merged row of each token. size: (b m), fp32, tokens in each row; 0 marks padding, which evens out
    images that merge different counts. head: (b m) the token that a row is named after: its destination, or the
    token itself where nothing was merged. prune: a row holds its head's value and not its group's mean. padded: whether
    there may be padding.

    It knows nothing of how the match was made. Sums are taken in fp32: half-precision group sums overflow. Indices are
    int32, as they are kept from step to step.
    """

    row: Tensor
    size: Tensor
    head: Tensor
    prune: bool = False
    padded: bool = False

    @classmethod
    def from_target(cls, target: Tensor, m: int, prune: bool = False, padded: bool = False) -> Pairing:
        """The pairing in which token i joins token target[i]; a token that stays, or is joined, has itself there.

        Args:
            target: (b n) token indices; target[target[i]] == target[i].
            m: length of the merged sequence; at least the largest number of tokens that stay in any row.
        """
        b, n = target.shape
        own = torch.arange(n, device=target.device)
        row = ((target == own).cumsum(1) - 1).gather(1, target)
        # the precision is named wherever a tensor begins: torch's default is the host's to choose
        size = torch.zeros(b, m, device=target.device, dtype=torch.float32)
        size.scatter_add_(1, row, torch.ones_like(row, dtype=torch.float32))
        head = torch.zeros(b, m, dtype=torch.int32, device=target.device).scatter_(1, row, target.int())
        return cls(row.int(), size, head, prune, padded)

    def take(self, index: Tensor) -> Pairing:
        """The pairing whose batch row i is this one's row index[i]. Of a single row nothing is copied."""
        if self.row.shape[0] == 1:
            row, size, head = (t.expand(len(index), -1) for t in (self.row, self.size, self.head))
        else:
            row, size, head = (t[index] for t in (self.row, self.size, self.head))
        return Pairing(row, size, head, self.prune, self.padded)

    @property
    def kept(self) -> list[Tensor]:
        """All tensors that it holds by now."""
        biases = [bias for bias in vars(self).values() if isinstance(bias, KeyBias)]
        more = (tensor for bias in biases for tensor in bias.kept)
        return [t for t in (*vars(self).values(), *self._weights.values(), *more) if isinstance(t, Tensor)]

    @property
    def target(self) -> Tensor:
        """(b n) the token that each token is represented by; inverse of :meth:`from_target`."""
        return self.head.gather(1, self.row.long()).long()

    def merge(self, x: Tensor) -> Tensor:
        """x (b n c) as (b m c): each row the mean of its tokens, or its head's value when pruning. Padding is 0."""
        b, n, c = x.shape
        m = self.size.shape[1]
        flat = x.reshape(b * n, c)
        if self.prune:
            return flat.index_select(0, self._flat_head).view(b, m, c)
        if x.device.type in _BAGS:
            weights = self._weights_in(x.dtype)
            bags = functional.embedding_bag(
                self._order, flat, self._offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
            )
            return bags.view(b, m, c)
        total = torch.zeros(b * m, c, device=x.device, dtype=torch.float32).index_add_(0, self.flat_row, flat.float())
        return (total * self._inverse_size).to(x.dtype).view(b, m, c)

    def unmerge(self, y: Tensor) -> Tensor:
        """y (b m c) as (b n c): every token gets its row's value. One gather."""
        b, m, c = y.shape
        return functional.embedding(self.flat_row, y.reshape(b * m, c)).view(b, -1, c)

    @cached_property
    def log_size(self) -> KeyBias:
        """(b m) what the logits of a merged key gain in proportional attention; -inf for padding."""
        return KeyBias(self.size.log())

    @cached_property
    def log_mask(self) -> KeyBias:
        """(b m) 0 for a row, -inf for padding: attention that is not proportional, but sees no padding."""
        return KeyBias(self.size.clamp(max=1).log())

    @cached_property
    def flat_row(self) -> Tensor:
        """(b * n) the merged row of each token, counted through all batch rows."""
        return self._flat(self.row, self.size.shape[1])

    @cached_property
    def _flat_head(self) -> Tensor:
        return self._flat(self.head, self.row.shape[1])

    @cached_property
    def _inverse_size(self) -> Tensor:
        return self.size.clamp(min=1).reciprocal().view(-1, 1)

    @cached_property
    def _order(self) -> Tensor:
        """The tokens, row by row."""
        return self.flat_row.argsort(stable=True).int()

    @cached_property
    def _offsets(self) -> Tensor:
        """Where each row begins in the order, and where the last one ends."""
        return functional.pad(self.size.flatten().cumsum(0, dtype=torch.int32), (1, 0))

    def _weights_in(self, dtype: torch.dtype) -> Tensor:
        """What each token of the order counts for in its row's mean."""
        if dtype not in self._weights:
            inverse = self.size.clamp(min=1).reciprocal().flatten()
            self._weights[dtype] = inverse.index_select(0, self.flat_row.index_select(0, self._order)).to(dtype)
        return self._weights[dtype]

    @cached_property
    def _weights(self) -> dict[torch.dtype, Tensor]:
        return {}

    def _flat(self, index: Tensor, length: int) -> Tensor:
        """An index into each batch row's `length` places, counted through all batch rows."""
        b = len(index)
        first = torch.arange(0, b * length, length, dtype=index.dtype, device=index.device)[:, None]
        return (index + first if b > 1 else index).flatten()
