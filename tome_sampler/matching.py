"""Which tokens are destinations, and which source goes to which of them.

Everything here is a pure function of its arguments. Randomness is a hash of (seed, token): the same on every device,
without a generator, without a copy from the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

_SCORES_AT_ONCE = 1 << 25
_SCORES_PER_NUMBER = 8
"""Nor more at once than so many for each number of the metric: as wide is a feed-forward, whose peak of memory matching
must not pass. It acts where there are few channels for many tokens."""
_SAMPLED = 14
"""One of so many sources is in a sample, which takes a tenth of a match's time."""
_FEWEST_SAMPLED = 32


@dataclass(frozen=True, eq=False)
class Dst:
    """Destinations. index: (b k) their tokens. cells: (rows, columns) if there is one in each of a grid of cells,
    row by row from the top left, else None."""

    index: Tensor
    cells: tuple[int, int] | None

    def sources(self, n: int) -> Tensor:
        """(b n - k) the others of n tokens, in their order; found once, for all layers that share the destinations."""
        if n not in self._sources:
            b, k = self.index.shape
            is_source = torch.ones(b, n, dtype=torch.bool, device=self.index.device).scatter_(1, self.index, False)
            self._sources[n] = _places(is_source, n - k)
        return self._sources[n]

    def sample(self, n: int) -> Tensor:
        """(b s) some of the sources, from all over the picture."""
        if n not in self._samples:
            sources = self.sources(n)
            length = sources.shape[1]
            count = min(max(-(-length // _SAMPLED), _FEWEST_SAMPLED), length)
            # one from anywhere in each of equal parts: even steps may be in step with the picture's width, and take a
            # sample from a few columns only. In whole numbers, as a rounded one could be one too large
            within = (hashed_uniform(count, 0, sources.device) * 2**24).long()
            places = ((torch.arange(count, device=sources.device) << 24) + within) * length // max(count, 1) >> 24
            self._samples[n] = sources[:, places] if count < length else sources
        return self._samples[n]

    @cached_property
    def _samples(self) -> dict[int, Tensor]:
        return {}

    @cached_property
    def _sources(self) -> dict[int, Tensor]:
        return {}


def hashed_uniform(count: int, seed: int, device: torch.device) -> Tensor:
    """(count,) numbers in 0 .. 1, the same for the same seed on every device; no generator is touched."""
    z = torch.arange(count, device=device, dtype=torch.int64) + (seed * 0x9E3779B1 & 0xFFFFFFFF)
    for multiplier in (0x21F0AAAD, 0x735A2D97):  # two rounds of a 32-bit xor-shift-multiply mixer
        z = ((z ^ (z >> 16)) * multiplier) & 0xFFFFFFFF
    z = z ^ (z >> 15)
    return (z & 0xFFFFFF).float() / (1 << 24)


def cell_size(grid: tuple[int, int], stride: int) -> tuple[int, int]:
    """(rows, columns) of a cell: the stride, but never more than the grid has."""
    return min(stride, grid[0]), min(stride, grid[1])


def grid_dst(grid: tuple[int, int], stride: int, device: torch.device, seed: int | None) -> Dst:
    """One token of each whole stride x stride cell, the same for every row (b = 1): a random one, or without a seed
    the first. What an indivisible grid leaves over on the right and below has none (ToMe-SD)."""
    sy, sx = cell_size(grid, stride)
    rows, columns = grid[0] // sy, grid[1] // sx
    if seed is None:
        pick = torch.zeros(rows * columns, dtype=torch.long, device=device)
    else:
        pick = (hashed_uniform(rows * columns, seed, device) * (sy * sx)).long()
    cell = torch.arange(rows * columns, device=device)
    y, x = cell // columns * sy + pick // sx, cell % columns * sx + pick % sx
    return Dst((y * grid[1] + x)[None], (rows, columns))


def cell_dst(rank: Tensor, grid: tuple[int, int], stride: int) -> Dst:
    """The most important token of each cell, cells cut by the edge included; the first one where all are alike.

    Importance decides at every ratio, and no part of the picture is without a destination near it.
    """
    sy, sx = cell_size(grid, stride)
    tokens = _in_cells(rank.view(-1, *grid, 1), grid, stride, -1.0).squeeze(-1)  # (b rows columns sy*sx)
    rows, columns = tokens.shape[1:3]
    pick = tokens.argmax(-1)
    y = torch.arange(rows, device=rank.device)[:, None] * sy + pick // sx
    x = torch.arange(columns, device=rank.device) * sx + pick % sx
    return Dst((y * grid[1] + x).flatten(1), (rows, columns))


def pool_dst(rank: Tensor, r: int, stride: int, pool: float, seed: int) -> tuple[Dst, Tensor]:
    """Destinations drawn at random from the most important tokens, and the pool itself, a mask (b n).

    Wu et al. 2025, section 3.3: the pool has min(pool * (n - r), n) tokens, n / stride**2 of them become
    destinations, drawn per image without replacement.
    """
    n = rank.shape[1]
    k = max(n // stride**2, 1)
    members = max(min(int(pool * (n - r)), n), k)
    in_pool = largest(rank, members)
    # one draw for each image's k-th token: the same image draws the same alone or in a batch
    lot = hashed_uniform(n, seed, rank.device) + in_pool
    return Dst(_places(largest(lot, k), k), None), in_pool


def global_match(metric: Tensor, dst: Dst) -> tuple[Tensor, Tensor]:
    """Each source's most similar destination among all: cosine (b n), fp32, and its token (b n). A destination has
    the score -2 and itself.

    Products are taken in the metric's own precision, of vectors normalised in fp32; a zero vector is similar to
    nothing (0), never NaN, and so is one that a broken model gave: on CUDA a bad index would end the process.
    """
    b, n, _ = metric.shape
    unit = _unit(metric).to(metric.dtype)
    index, src = dst.index.expand(b, -1), dst.sources(n).expand(b, -1)
    value, nearest = _nearest(_tokens(unit, src), _tokens(unit, index), _SCORES_PER_NUMBER * metric.numel())
    score = value.new_full((b, n), -2.0).scatter_(1, src, value)
    target = torch.arange(n, device=metric.device).expand(b, -1).scatter(1, src, index.gather(1, nearest))
    return score, target


def share_above(threshold: float, metric: Tensor, dst: Dst, penalty: Tensor | None = None) -> Tensor:
    """The share (b) of the tokens whose score in a global match would be at least `threshold`, from a sample of them.

    Args:
        penalty: (b n) what is taken off each token's score. A local match's scores are no higher.
    """
    b, n, _ = metric.shape
    few = dst.sample(n).expand(b, -1)
    sources, candidates = (_unit(_tokens(metric, i)).to(metric.dtype) for i in (few, dst.index.expand(b, -1)))
    score, _ = _nearest(sources, candidates, _SCORES_PER_NUMBER * metric.numel())
    if penalty is not None:
        score = score - penalty.gather(1, few)
    return (score >= threshold).sum(1, dtype=torch.float32) * ((1 - dst.index.shape[1] / n) / max(few.shape[1], 1))


def local_match(
    metric: Tensor, dst: Dst, grid: tuple[int, int], stride: int, neighbourhood: int
) -> tuple[Tensor, Tensor]:
    """As :func:`global_match`, but among the destinations at most `neighbourhood` cells away.

    Shifted products over whole cells: no gather, about an eighth of the global search's time at 4096 tokens. A
    token without a destination near it has the score -2 and stays.
    """
    if dst.cells is None:
        raise ValueError("a local match needs one destination per cell")
    b, _, c = metric.shape
    rows, columns = dst.cells
    index = dst.index.expand(b, -1)
    unit = _unit(metric)
    tokens = _in_cells(unit.view(b, *grid, c), grid, stride, 0.0)  # (b R C s c)
    down, right = tokens.shape[1] - rows, tokens.shape[2] - columns  # cells at the edge without a destination
    near = neighbourhood
    border = (near, near + right, near, near + down)
    candidates = _tokens(unit, index).view(b, rows, columns, c)
    candidates = F.pad(candidates, (0, 0, *border))
    where = F.pad(index.view(b, rows, columns), border, value=-1)
    best = tokens.new_full(tokens.shape[:-1], -2.0)
    target = torch.zeros_like(best, dtype=torch.long)
    for y in range(2 * near + 1):
        for x in range(2 * near + 1):
            window = (slice(None), slice(y, y + tokens.shape[1]), slice(x, x + tokens.shape[2]))
            token = where[window][..., None]
            score = (tokens @ candidates[window][..., None]).squeeze(-1).nan_to_num(0.0).where(token >= 0, -2.0)
            closer = score > best
            best, target = score.where(closer, best), token.where(closer, target)
    return _from_cells(best, grid, stride), _from_cells(target, grid, stride)


def mean_similarity(metric: Tensor, token: Tensor, other: Tensor) -> Tensor:
    """Mean cosine similarity of pairs of tokens, (rows s) each."""
    a, b = (_tokens(metric, i).float() for i in (token, other))
    return F.cosine_similarity(a, b, dim=-1, eps=1e-6).mean()


def largest(key: Tensor, count: Tensor | int, most: int | None = None) -> Tensor:
    """Mask (b n) of the `count` tokens, one number or one for each row (b 1), that have the largest keys (b n), none of
    which is NaN; of equal keys the first ones, on every device. most: the largest of several counts.

    Nothing is sorted but the keys that several counts end at: on a CPU a fifth of the time at 4096 tokens.
    """
    if isinstance(count, int):
        least = key.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
    else:
        falling = key.topk(key.shape[1] if most is None else most, dim=1).values
        least = falling.gather(1, (count - 1).clamp(min=0).expand(len(key), 1))
    above = key > least
    last = key == least
    return above | (last & (last.cumsum(1) <= count - above.sum(1, keepdim=True)))


def _places(mask: Tensor, k: int) -> Tensor:
    """(b k) where a mask (b n) of k tokens in each row is true, rising."""
    b, n = mask.shape
    to = (mask.cumsum(1) - 1).where(mask, k)  # the others all go to one place too many
    token = torch.arange(n, device=mask.device).expand(b, n)
    return torch.empty(b, k + 1, dtype=torch.long, device=mask.device).scatter_(1, to, token)[:, :k]


def _nearest(sources: Tensor, candidates: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Each source's largest product with a candidate, fp32, and which it is: (b s) of (b s c) and (b k c). At most
    `most` products are there at once."""
    # contiguous: over few channels the product of a transposed view takes twice as long on a CPU
    columns = candidates.transpose(1, 2).contiguous()
    chunk = max(min(_SCORES_AT_ONCE, most) // max(columns.shape[0] * columns.shape[2], 1), 1)
    best = [(part @ columns).max(-1) for part in sources.split(chunk, 1)]
    value, nearest = best[0] if len(best) == 1 else (torch.cat(parts, 1) for parts in zip(*best, strict=True))
    return value.float().nan_to_num(0.0), nearest


def _tokens(x: Tensor, index: Tensor) -> Tensor:
    """The tokens (b k c) of x (b n c) at an index (b k). Whole rows: `gather` with an index for each number takes ten
    times as long on a CPU."""
    b, n, c = x.shape
    if b > 1:
        index = index + torch.arange(0, b * n, n, device=x.device)[:, None]
    return x.reshape(b * n, c).index_select(0, index.flatten()).view(b, -1, c)


def _unit(metric: Tensor) -> Tensor:
    return F.normalize(metric.float(), dim=-1, eps=1e-6)


def _in_cells(x: Tensor, grid: tuple[int, int], stride: int, fill: float) -> Tensor:
    """(b h w c) as cells (b R C tokens c), the grid filled up to whole cells."""
    sy, sx = cell_size(grid, stride)
    x = F.pad(x, (0, 0, 0, -grid[1] % sx, 0, -grid[0] % sy), value=fill)
    return rearrange(x, "b (R sy) (C sx) c -> b R C (sy sx) c", sy=sy, sx=sx)


def _from_cells(x: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """Cells (b R C tokens) as (b n), without what filled them up."""
    sy, sx = cell_size(grid, stride)
    return rearrange(x, "b R C (sy sx) -> b (R sy) (C sx)", sy=sy, sx=sx)[:, : grid[0], : grid[1]].flatten(1)
