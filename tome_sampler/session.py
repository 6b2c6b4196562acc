"""One sampling run: the only place where tensors and models meet. It owns all that changes, and dies with the run."""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tome_sampler.config import MergeConfig
from tome_sampler.gate import ALONE, CALLS, computed_in, least_tokens, pays_alone
from tome_sampler.importance import cfg_magnitude, importance_on_grid, importance_rank
from tome_sampler.matching import (
    Dst,
    cell_dst,
    cell_size,
    global_match,
    grid_dst,
    largest,
    local_match,
    mean_similarity,
    pool_dst,
    share_above,
)
from tome_sampler.pairing import Pairing
from tome_sampler.positions import position_features
from tome_sampler.refresh import Clock, Moment, SigmaRatio, calls_served
from tome_sampler.stats import Stats

log = logging.getLogger("tome_sampler")

_DRIFT_SAMPLE = 256
_ALWAYS = 4.0  # added to a cosine it outranks every other; small enough to keep the order in fp32


@dataclass(frozen=True)
class ModelCall:
    """What a host tells about one model call.

    sigma: noise level, > 0, or None where unknown: then no pairs are reused. latent_size: (h, w) of the model's
    input, or None where unknown: then only square token grids are merged. branches: "cond" or "uncond" for each batch
    row; without any, the call passes through. images: the number of its image, from 0, for each batch row. further:
    whether the sampler's evaluation of its denoiser began with a call before this one, as where memory is saved by
    calling the model for one cond after the other; all of them have the pairs of the first.
    """

    sigma: float | None
    latent_size: tuple[int, int] | None
    branches: tuple[str, ...]
    images: tuple[int, ...]
    further: bool = False

    def __post_init__(self) -> None:
        if len(self.branches) != len(self.images):
            raise ValueError(f"{len(self.branches)} branches and {len(self.images)} images; each names every batch row")
        for branch in self.branches:
            if branch not in ("cond", "uncond"):
                raise ValueError(f"branch is {branch!r}; it must be 'cond' or 'uncond'")

    @classmethod
    def chunked(
        cls,
        sigma: float | None,
        latent_size: tuple[int, int] | None,
        branches: Sequence[str],
        images: int,
        further: bool = False,
    ) -> ModelCall:
        """A batch of equal chunks, one for each of `branches`, of `images` rows each."""
        rows = tuple(branch for branch in branches for _ in range(images))
        return cls(sigma, latent_size, rows, tuple(range(images)) * len(branches), further)


@dataclass(frozen=True)
class Layer:
    """A place in the model. name: as in ``named_modules``. block: the number of its transformer block, from 0."""

    name: str
    block: int


@dataclass
class _Cached:
    """Pairs of one block, and what deciding on their reuse needs."""

    moment: Moment | None
    evaluation: int  # in which it was last decided on
    branches: frozenset[str]
    early: bool
    maker: str
    pairing: Pairing | None  # one row per image, or per batch row; None: nothing to merge
    expanded: dict[tuple[int, ...], Pairing] = field(default_factory=dict)  # per batch row, by each row's place
    sample: tuple[Tensor, ...] = ()  # a few merged tokens and their destinations, (rows s) each
    similarity: Tensor | None = None  # of the sample when it was paired
    lost: Tensor | None = None  # of that similarity, when last reused; not yet read
    drift: float = 0.0

    @property
    def kept(self) -> list[Tensor]:
        """All tensors that it holds by now."""
        pairings = [*self.expanded.values()] if self.pairing is None else [self.pairing, *self.expanded.values()]
        rest = [t for t in (*self.sample, self.similarity, self.lost) if t is not None]
        return [*rest, *(tensor for pairing in pairings for tensor in pairing.kept)]


class MergeSession:
    """The run state of token merging, and its seam: :meth:`call`, :meth:`merge`, :meth:`observe`.

    Args:
        config: what the user chose.
        sigmas: the schedule that the sampler will follow, if known; it makes `start`, `end` and checkpoint fractions
            exact.
        restarts: the sampler may go back to its first sigma (Restart does): a second run is then not noticed, so this
            is for hosts that make a session for each run.
        timed: measure how long matching and merging take.

    ``stats`` holds what was done. A session serves one run; :meth:`reset` readies it for the next.
    """

    largest: int
    """How many numbers (b n c) the largest layer has that has merged at this size; 0: no pairs are kept."""

    def __init__(
        self, config: MergeConfig, sigmas: Sequence[float] | None = None, *, restarts: bool = False, timed: bool = False
    ) -> None:
        self.config = config
        self.suspended = False
        self._sigmas = None if sigmas is None else [float(s) for s in sigmas]
        self._restarts, self._timed = restarts, timed
        self._table: list[float] | None = None
        self._levels: set[int] = set()  # how coarse they are: of the model, so it outlives runs and sizes
        self.reset()

    def reset(self, sigmas: Sequence[float] | None = None) -> None:
        """Forget the run: pairs, importance, statistics and time. `sigmas`: the next one's schedule, where known."""
        if sigmas is not None:
            self._sigmas = [float(s) for s in sigmas]
        self.stats = Stats()
        self._grown = False  # whether the cache holds pairs that the statistics have not weighed
        self._clock = Clock(self._sigmas, self._table, self._restarts)
        self._call: ModelCall | None = None
        self._moment: Moment | None = None
        self.early = self._as_early = False
        self._evaluation = 0  # of the denoiser, by the sampler: one call, or one for each cond and branch
        self._first: float | None = None  # the noise level of the first one
        self._anew = False  # whether one of the same noise level began something else
        self._part = 0  # which of its calls this is
        self._evaluated: tuple[float | None, set[str]] = None, set()  # at which sigma, and the branches that have run
        self._told: set[int] = set()  # images, since importance was last observed
        self._images = 0  # that importance is of
        self._noted: set[str] = set()
        self._index: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self._importance: Tensor | None = None
        self._forget_size(None)

    def know_table(self, sigmas: Sequence[float]) -> None:
        """All noise levels of the model, falling: fractions of a run without a known schedule are places in it."""
        self._table = [float(s) for s in sigmas]
        if self._evaluation == 0:
            self._clock = Clock(self._sigmas, self._table, self._restarts)

    @property
    def current(self) -> ModelCall | None:
        """The model call under way, if a host told of one."""
        return self._call

    @property
    def latent_size(self) -> tuple[int, int] | None:
        """The (h, w) of the last call, where a host told of it."""
        return self._latent_size

    @property
    def importance(self) -> Tensor | None:
        """The map (images h w) that the last :meth:`observe` gave, used by the next call; None without guidance, and
        at a size at which nothing is merged."""
        return self._importance

    @contextmanager
    def call(self, call: ModelCall) -> Iterator[None]:
        """Within it, the model runs once as `call` says. Arguments and errors are those of :meth:`begin`."""
        self.begin(call)
        try:
            yield
        finally:
            self.end()

    def begin(self, call: ModelCall) -> None:
        """The model runs once as `call` says, until :meth:`end` or the next begin; :meth:`call` is the safer form.
        State of another latent size is forgotten.

        Raises:
            ValueError: sigma is not above 0. RuntimeError: a second run without :meth:`reset`.
        """
        moment = None if call.sigma is None else self._clock.moment(call.sigma)
        self._weigh()  # after a call that nobody ended
        if call.images:
            self._place(call)
        if call.latent_size != self._latent_size:
            self._forget_size(call.latent_size)
        self._call, self._moment = call, moment
        self.early = self._as_early = moment is not None and self.config.is_early(moment.sigma)
        self._seen.clear()
        self._cells.clear()
        self.stats.begin(call.sigma)
        self._read_drift()

    def end(self) -> None:
        """The model call is over."""
        self._weigh()
        self._call = self._moment = None
        self._cells.clear()

    def _place(self, call: ModelCall) -> None:
        """Whether a call goes on with the evaluation under way, or begins one."""
        sigma, branches = self._evaluated
        if call.sigma is not None and call.sigma == sigma and (call.further or not branches & set(call.branches)):
            self._part += 1
        else:
            self._evaluation, self._part, branches = self._evaluation + 1, 0, set()
            if self._evaluation == 1:
                self._first = call.sigma
            # no sampler evaluates twice where it begins: another picture, or another part of it
            self._anew = self._evaluation > 1 and call.sigma is not None and call.sigma == self._first
        self._evaluated = call.sigma, branches | set(call.branches)
        self._told |= set(call.images)

    @property
    def modules(self) -> tuple[str, ...]:
        """Which parts of a block run on merged tokens, in this part of the run."""
        return self._now(self.early).modules

    def merge_as(self, early: bool) -> None:
        """This call merges as one of the run's early part does, or of the later one, whatever its noise level: the
        lengths of a compiled graph were settled before that was known."""
        self._as_early = early and self.config.early is not None

    @torch.no_grad()
    def observe(self, cond: Tensor, uncond: Tensor) -> None:
        """Importance for the next call, from both branches of this one: model outputs (images c h w), or of
        clips (b c frames h w). There is none where all layers are left alone, and none would ask for it."""
        idle = bool(self._left_alone) and not self._merges
        self._importance = None if idle else cfg_magnitude(cond, uncond)
        if self._told:
            self._images, self._told = max(self._told) + 1, set()
        self._ranks.clear()
        self._cells.clear()

    def leaves_alone(self, layer: Layer, n: int) -> bool:
        """Whether a layer of n tokens is known not to be merged in all of this run: of a coarser level, or too short
        to be worth it. That is nearly all there is to do in a small model, so it must cost nothing."""
        return (layer.name, n) in self._left_alone

    def left_alone(self, layer: Layer) -> int:
        """How many tokens a layer has that is left alone; 0 if it is not, or nothing would tell when that is over, as
        the latent's size is not known."""
        known = self._left_alone if self._latent_size is not None else ()
        return next((n for name, n in known if name == layer.name), 0)

    def merge(
        self, layer: Layer, x: Tensor, metric: Tensor | None = None, grid: tuple[int, int] | None = None
    ) -> Pairing | None:
        """The pairing to merge a layer's tokens x (b n c) with, or None: leave them alone.

        `metric` (b n c') is what similarity is taken of, by default x itself. `grid` is (h, w) of the n tokens, by
        default what the latent's size says.
        """
        if self.suspended or (self._call is not None and not self._call.images):
            return None
        b, n, _ = x.shape
        if not b or self.leaves_alone(layer, n):
            return None
        grid = grid or self.grid(n)
        if grid is None or grid[0] * grid[1] != n:
            self.note(f"{n} tokens are not the grid of a {self._latent_size or 'square'} latent: passed through")
            return None
        config = self.config
        if self.too_coarse(n) or self.too_short(layer, n, x.shape[2], x.dtype, x.device.type):
            self._left_alone.add((layer.name, n))  # for as long as the size is the same
            return None
        if self._call is not None and layer.name in self._seen:  # a reference pass, say: not the tokens it was first
            self.note(f"{layer.name} ran more than once in a model call: passed through")
            return None
        self._seen.add(layer.name)
        self._merges = True
        images, branches = self._rows(b)
        if images is None:
            self.note(f"a batch of {b} rows where the model call told of {len(branches)}: passed through")
            return None
        if config.metric == "position":
            metric = position_features(grid, x.device).expand(b, -1, -1)
        pairing, made = None, None
        if config.ratio > 0 and self._active():
            pairing, made = self._pairing(layer, x, x if metric is None else metric, grid, images, branches)
        if pairing is not None:
            self.largest = max(self.largest, x.numel())
        after = n if pairing is None else pairing.size.shape[1]
        self.stats.count(layer.name, n * b, after * b, None if pairing is None else made)
        return pairing

    def take_back(self, layer: Layer, x: Tensor, pairing: Pairing) -> None:
        """A layer for whose x (b n c) there was a pairing runs on all its tokens, because of an error since."""
        b, n, _ = x.shape
        self.stats.take_back(layer.name, n * b, pairing.size.shape[1] * b)

    def fixed_length(self, n: int, latent_size: tuple[int, int]) -> int | None:
        """How many tokens are left of a layer's n, if that is the same in every call of this part of a run, the early
        or the later one; else None."""
        config, grid = self._now(self.early), _grid_of(n, latent_size)
        always = config.threshold is None and config.start <= 0 and config.end >= 1 and not config.protect
        r = int(n * config.ratio)
        if grid is None or not always or r <= 0:
            return None
        sy, sx = cell_size(grid, config.stride)
        cut, whole = -(-grid[0] // sy) * -(-grid[1] // sx), (grid[0] // sy) * (grid[1] // sx)
        if config.destinations == "cell" and config.prune_until <= 0:
            return n - min(r, n - cut)
        if config.destinations == "grid":
            return n - min(r, n - whole)
        return n - r if r <= n - max(cut, n // config.stride**2) else None

    def too_coarse(self, n: int) -> bool:
        """Whether a layer of n tokens is of an attention level that is not merged."""
        return self._level(n) >= self.config.levels

    def too_short(self, layer: Layer, n: int, channels: int, dtype: torch.dtype, device: str) -> bool:
        """Whether a layer of n tokens is left alone: the size gate."""
        config = self.config
        if config.min_tokens != "auto":
            return n < config.min_tokens
        if config.ratio <= 0:
            return False
        early = config.ratio if config.early is None else config.early.ratio
        # about half of a run is early
        reason = self._does_not_pay((config.ratio + early) / 2, layer, n, channels, dtype, device)
        if reason is not None:
            self.note(reason)
        return reason is not None

    def _does_not_pay(
        self, ratio: float, layer: Layer, n: int, channels: int, dtype: torch.dtype, device: str
    ) -> str | None:
        """Why a layer is better left alone than merged at a ratio > 0, or None."""
        always = calls_served(self.config.refresh) < CALLS
        least = least_tokens(channels, computed_in(dtype, device), device, ratio, always)
        if n < least:
            return f"layers of {n} tokens are left alone: on {device} merging pays from {least} (min_tokens='auto')"
        alone = self._alone(layer)
        if alone is None or pays_alone(alone, n, channels, device, ratio, always):
            return None
        return f"{alone} of {n} tokens is left alone: without attn1 it does not pay on {device} (min_tokens='auto')"

    def _alone(self, layer: Layer) -> str | None:
        """The part of a block whose savings must pay for the pairs that this layer is merged with, where that is not
        self-attention in all of a run."""
        part = layer.name.rsplit(".", 1)[-1]
        for modules in (self.config.modules, self._now(early=True).modules):
            if part in ALONE and part in modules and "attn1" not in modules:
                return "ff" if "ff" in modules else "attn2"
        return None

    def timed(self, part: str, device: torch.device) -> AbstractContextManager[None]:
        """Within it, time counts for "matching" or "merging", if this session is timed."""
        return self.stats.timed(part, device) if self._timed else nullcontext()

    def note(self, message: str) -> None:
        """Say once, in the log and the statistics, why something was passed through."""
        if message not in self._noted:
            self._noted.add(message)
            self.stats.notes.append(message)
            log.warning("token merging: %s", message)

    def pairings(self) -> dict[int, Pairing]:
        """The cached pairing of each block that has one; for pictures of what was merged."""
        return {key[0]: cached.pairing for key, cached in self._cache.items() if cached.pairing is not None}

    # -- deciding

    def _active(self) -> bool:
        fraction = 0.0 if self._moment is None else self._moment.fraction
        return self.config.start - 1e-6 <= fraction < self.config.end + (self.config.end >= 1)

    def _rows(self, b: int) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
        if self._call is None:  # nobody told: each row an image of its own
            return tuple(range(b)), ("cond",) * b
        return (self._call.images if len(self._call.images) == b else None), self._call.branches

    def _level(self, n: int) -> int:
        """The place of a layer of n tokens among the model's attention levels, 0 for the finest one known.

        Levels are known by how many times coarser than the latent they are, once they have run: a model that runs a
        coarse level before its finest one is merged there in its first call.
        """
        h, w = self._latent_size or (1, 1)
        levels = self._sizes if self._latent_size is None else self._levels
        coarseness = round(math.log2(h * w / n))
        levels.add(coarseness)
        return sorted(levels).index(coarseness)

    def grid(self, n: int) -> tuple[int, int] | None:
        """The (h, w) of n tokens of the last call's latent, or None if they are not a downsampling of it."""
        if n not in self._grids:
            self._grids[n] = _grid_of(n, self._latent_size)
        return self._grids[n]

    def _due(self, cached: _Cached) -> bool:
        now, made_at = self._moment, cached.moment
        # another module of the same block, or the other branch or another cond in a call of its own
        if cached.evaluation == self._evaluation and self._call is not None:
            return False
        if now is None or made_at is None or self._anew or made_at.sigma < now.sigma * (1 - 1e-3):
            return True
        if self._prunes(made_at) != self._prunes(now) or cached.early != self._as_early:
            return True
        if cached.pairing is None and self.config.refresh.measures_drift:  # what was not merged does not drift
            return SigmaRatio().due(made_at, now, 0.0)
        return self.config.refresh.due(made_at, now, cached.drift)

    def _now(self, early: bool) -> MergeConfig:
        """What holds in a part of the run."""
        return self.config.early or self.config if early else self.config

    def _prunes(self, moment: Moment | None) -> bool:
        return moment is not None and moment.fraction < self.config.prune_until - 1e-6

    @torch.no_grad()
    def _pairing(
        self,
        layer: Layer,
        x: Tensor,
        metric: Tensor,
        grid: tuple[int, int],
        images: tuple[int, ...],
        branches: tuple[str, ...],
    ) -> tuple[Pairing | None, bool]:
        """The cached pairing, one row per batch row, or a new one; and whether it is new."""
        n = metric.shape[1]
        block = -1 if self.config.share_layers else layer.block
        unique = tuple(dict.fromkeys(images))
        if self.config.share_branches:
            key = (block, n, unique)
            # the first cond row of each image speaks for it
            order = sorted(range(len(images)), key=lambda r: branches[r] != "cond")
            rows = tuple(next(r for r in order if images[r] == image) for image in unique)
        else:
            # rows of several conds in calls of their own are rows of their own, too
            key = (block, n, (*images, *(-1 - (branch == "cond") for branch in branches), -3 - self._part))
            rows = tuple(range(len(images)))
        cached = self._cache.get(key)
        made = cached is None or self._due(cached)
        if cached is None or made:
            with self.timed("matching", metric.device):
                tokens = self._take(metric, rows)
                cached = self._make(layer, x, tokens, grid, tuple(images[r] for r in rows), branches)
            self._cache[key], self._grown = cached, True
        elif cached.similarity is not None and cached.maker == layer.name and cached.branches & set(branches):
            cached.lost = cached.similarity - mean_similarity(self._take(metric, rows), *cached.sample)
        cached.evaluation = self._evaluation
        pairing = cached.pairing
        if pairing is not None and len(rows) != len(images):
            places = tuple(unique.index(image) for image in images)
            if places not in cached.expanded:
                cached.expanded[places] = pairing.take(self._on_device(places, metric.device))
                self._grown = True
            pairing = cached.expanded[places]
        return pairing, made

    def _make(
        self,
        layer: Layer,
        x: Tensor,
        metric: Tensor,
        grid: tuple[int, int],
        images: tuple[int, ...],
        branches: tuple[str, ...],
    ) -> _Cached:
        """Match the tokens of `metric` (rows n c) on a grid; row i is of the image images[i]. x: what is to merge."""
        n, prune = metric.shape[1], self._prunes(self._moment)
        config = self._now(self._as_early)
        r = int(n * config.ratio)
        pooled, rank = self._importance_on(grid, images, metric.device)
        in_pool = None
        if config.destinations == "pool" and rank is not None and not prune:
            dst, in_pool = pool_dst(rank, r, config.stride, config.pool, self._seed(layer))
        elif config.destinations == "cell" and not prune:
            cells = grid, images, config.stride
            if cells not in self._cells:  # the same for all layers of a level
                zeros = metric.new_zeros(1, n)
                self._cells[cells] = cell_dst(zeros if rank is None else rank, grid, config.stride)
            dst = self._cells[cells]
        else:
            dst = grid_dst(grid, config.stride, metric.device, self._seed(layer) if config.random else None)
        cached = _Cached(self._moment, self._evaluation, frozenset(branches), self._as_early, layer.name, None)
        worth = None if in_pool is not None else self._worth(config, layer, x, metric, dst, rank)
        if worth is not None and not any(worth):
            return cached
        if config.search == "local":
            score, nearest = local_match(metric, dst, grid, config.stride, config.neighbourhood)
        else:
            score, nearest = global_match(metric, dst)
        key = score
        if rank is not None:
            key = key.sub(rank, alpha=config.importance)
            if config.protect:
                key = torch.where(rank >= 1 - config.protect, key - _ALWAYS, key)
            if in_pool is not None:
                key = torch.where(in_pool, key, key + _ALWAYS)
        key = key.scatter(1, dst.index.expand(len(images), -1), -math.inf)
        most = min(r, n - dst.index.shape[1])
        if rank is not None and config.protect:  # nor does a ratio reach them
            most = max(min(most, n - dst.index.shape[1] - int(n * config.protect) - 1), 0)
        count, m, most, total = _count(config, key, most, worth)
        if most == 0:
            return cached
        merged = largest(key, count, most)
        target = torch.where(merged, nearest, torch.arange(n, device=nearest.device))
        # the row that merges least is as long as the sequence: others are shorter where it does not merge the most
        cached.pairing = Pairing.from_target(target, m, prune, padded=m + most > n)
        if config.refresh.measures_drift:
            place = torch.linspace(0, 1, _DRIFT_SAMPLE, device=key.device, dtype=torch.float32) * (count - 1)
            order = key.argsort(dim=1, descending=True, stable=True)
            token = order.gather(1, place.long().clamp(min=0).expand(len(images), -1))
            cached.sample = token, target.gather(1, token)
            cached.similarity = mean_similarity(metric, *cached.sample)
        share = score.new_full((), math.nan) if pooled is None else (pooled * merged).sum() / pooled.sum()
        self.stats.measure(layer.name, (score * merged).sum() / total, share)
        return cached

    def _worth(
        self, config: MergeConfig, layer: Layer, x: Tensor, metric: Tensor, dst: Dst, rank: Tensor | None
    ) -> list[bool] | None:
        """Whether merging what passes the threshold pays, for each row of the metric, by a sample that costs a tenth of
        the match: the size gate where the ratio is not known beforehand. None: it pays at whatever passes."""
        if config.threshold is None or config.min_tokens != "auto":
            return None
        _, n, channels = x.shape

        def pays(ratio: float) -> bool:
            ratio = min(max(ratio, config.floor), config.ratio)
            return self._does_not_pay(ratio, layer, n, channels, x.dtype, x.device.type) is None

        if pays(0.0):
            return None
        if not pays(1.0):
            return [False] * len(metric)
        penalty = None if rank is None else config.importance * rank
        return [pays(share) for share in share_above(config.threshold, metric, dst, penalty).tolist()]

    # -- run state

    def _weigh(self) -> None:
        """Tell the statistics how much is kept: what several pairings share, once."""
        if self._grown:
            self._grown = False
            kept = (tensor for cached in self._cache.values() for tensor in cached.kept)
            storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in kept)}
            self.stats.cache_bytes = max(self.stats.cache_bytes, sum(storages.values()))

    def _forget_size(self, latent_size: tuple[int, int] | None) -> None:
        self._weigh()
        self._latent_size = latent_size
        self._cache: dict[tuple[int, int, tuple[int, ...]], _Cached] = {}
        self._importance = None
        self._ranks: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._sizes: set[int] = set()  # stands in for the levels where no latent size is known
        self._cells: dict[tuple[tuple[int, int], tuple[int, ...], int], Dst] = {}  # destinations, in this call
        self._left_alone: set[tuple[str, int]] = set()  # layers, and how many tokens they have
        self._seen: set[str] = set()  # layers that have merged in this model call
        self._merges = False  # whether any has, at this size
        self.largest = 0
        self._grids: dict[int, tuple[int, int] | None] = {}

    def release(self) -> None:
        """Let go of all tensors but the statistics'."""
        self._forget_size(None)
        self._index.clear()

    def _read_drift(self) -> None:
        """The one place that waits for measured drift: once per model call, for all layers together."""
        measured = [(cached, cached.lost) for cached in self._cache.values() if cached.lost is not None]
        if measured:
            lost = torch.stack([lost for _, lost in measured]).tolist()
            for (cached, _), drift in zip(measured, lost, strict=True):
                cached.drift, cached.lost = drift, None

    def _importance_on(
        self, grid: tuple[int, int], images: tuple[int, ...], device: torch.device
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Importance and its rank on a layer's grid, (rows n) each; computed once per step and size."""
        if self._importance is None or self._call is None or self._importance.shape[0] != self._images:
            return None, None
        if max(images) >= self._images:
            return None, None
        if grid not in self._ranks:
            pooled = importance_on_grid(self._importance, grid)
            self._ranks[grid] = pooled.to(device), importance_rank(pooled).to(device)
        pooled, rank = self._ranks[grid]
        return self._take(pooled, images), self._take(rank, images)

    def _take(self, x: Tensor, rows: tuple[int, ...]) -> Tensor:
        if rows == tuple(range(rows[0], rows[0] + len(rows))):  # nothing is copied
            return x[rows[0] : rows[-1] + 1]
        return x[self._on_device(rows, x.device)]

    def _on_device(self, rows: tuple[int, ...], device: torch.device) -> Tensor:
        if (rows, device) not in self._index:  # copied to the device once a run, not once a layer; nothing waits for it
            self._index[rows, device] = torch.tensor(rows).to(device, non_blocking=device.type == "cuda")
        return self._index[rows, device]

    def _seed(self, layer: Layer) -> int:
        """A draw for each block and noise level: the same in both branches' calls, and for every device and run."""
        level = 0 if self._moment is None else round(math.log(self._moment.sigma) * 1e5)
        block = -1 if self.config.share_layers else layer.block
        return zlib.crc32(repr((self.config.seed, block, level)).encode())


def _count(
    config: MergeConfig, key: Tensor, most: int, worth: list[bool] | None = None
) -> tuple[Tensor | int, int, int, int]:
    """How many tokens each row merges, the length of the merged sequence, how many the row that merges most does, and
    all together. Waits for the device only with a threshold, whose count the host must know.

    Args:
        worth: which rows are merged at all; None: all of them.
    """
    b, n = key.shape
    if config.threshold is None:
        return most, n - most, most, b * most
    least = min(int(n * config.floor), most)
    found = (key >= config.threshold).sum(1).tolist()
    merged = [min(max(count, least), most) * paid for count, paid in zip(found, worth or [True] * b, strict=True)]
    if config.batch_rule == "max":
        merged = [max(merged)] * b
    fewest, most = min(merged), max(merged)
    wanted = most if fewest == most else torch.tensor(merged, device=key.device)[:, None]
    return wanted, n - fewest, most, sum(merged)


def _grid_of(n: int, latent_size: tuple[int, int] | None) -> tuple[int, int] | None:
    """The (h, w) of n tokens: the latent downsampled by a whole number, sizes rounded up as strided convolutions do."""
    if latent_size is None:
        side = math.isqrt(n)
        return (side, side) if side * side == n else None
    for factor in range(1, max(latent_size) + 1):
        h, w = -(-latent_size[0] // factor), -(-latent_size[1] // factor)
        if h * w <= n:
            return (h, w) if h * w == n else None
    return None
