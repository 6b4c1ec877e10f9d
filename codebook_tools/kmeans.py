"""k-means: Lloyd's iterations with momentum, on samples that grow, over as many threads and processes as there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from itertools import islice

import torch
from torch import Tensor

from codebook_tools import processes
from codebook_tools.assignment import emitted, nearest, unit
from codebook_tools.codebook import Codebook, Emit, Latents, Lookup
from codebook_tools.seeding import Init, count_distinct, draw_by_error, refuse_too_few, seeds
from codebook_tools.threads import spread
from codebook_tools.watch import Watch

_GROWTH = 4  # each sample is so many times the one before
_POINTS_PER_CENTROID = 64  # in the first sample: fewer fit what is chance in it
_SLAB = {"cpu": 65_536, "cuda": 1 << 20}  # points at most that one thread, or a GPU, assigns and sums at a time
_SLABS = 16  # at least, so that all threads have work: not as many as there are threads, or results would hang on that
_LEAST = 4096  # points of a slab even so: fewer take longer to begin than to do
_WIDENED = {"cpu": 2048, "cuda": 1 << 18}  # points that are float64 at a time: in the cache of a core
_STRETCH = 1.3  # of each step to the means; more than 1.5 overshoots where cells are many
_AS_IF = 3  # iterations that momentum starts as if they had been made
_LOOK_BACK = 3  # iterations over which progress is judged: single ones may go up


@dataclass(frozen=True, eq=False)
class Clustering:
    """centroids: (k, dim) float32. inertia: sum of squared distances of all points to the centroids of the cells that
    these are the means of; to the nearest it can only be less. iterations: of Lloyd over all points. converged: whether
    the inertia had stopped falling by then."""

    centroids: Tensor
    inertia: float
    iterations: int
    converged: bool


def kmeans(
    points: Tensor,
    k: int,
    *,
    init: Init | Tensor = "kmeans++",
    iterations: int = 300,
    tolerance: float = 5e-4,
    seed: int = 0,
    lookup: Lookup = Lookup.EUCLIDEAN,
    emit: Emit = Emit.RAW,
    whole: Latents | None = None,
    watch: Watch,
) -> Clustering:
    """Lloyd's k-means over all points (Lloyd 1982), in squared Euclidean distance, or by the cosine.

    points: (n, dim) float32, in an order in which each head is a uniform sample (Survey.sample is); where the work is
    done is where they are. Seeds come from a small head, and Lloyd runs over heads that grow fourfold until all points
    take part: as good an optimum as from all points at once, in far fewer passes over all. A cluster that empties is
    moved to a point drawn by squared error. init: how seeds are drawn, or the (k, dim) seeds themselves. iterations:
    the most of them, over each head. tolerance: share of the inertia that an iteration must gain for more to follow.
    lookup, emit: how centroids are searched and given out. By the cosine, those at unit length are mean directions
    (spherical k-means, Dhillon and Modha 2001), and raw ones the means of the points that they are the nearest
    direction of. There is none for the dot product. whole: what `points` are a sample of, to go on over; then each
    process has its part of it, where it has the same `points` as all others.

    Each iteration goes beyond the means and on in the direction of the last ones (Nesterov 1983), until that fails
    (O'Donoghue and Candès 2015). Raises CodebookError where there are fewer than k distinct points.
    """
    assert k >= 1 and iterations >= 1 and lookup is not Lookup.DOT, (k, iterations, lookup)
    places = points if lookup is Lookup.EUCLIDEAN else unit(points)
    refuse_too_few(places, k)
    start = init if isinstance(init, Tensor) else seeds(places, k, init, seed)
    assert start.shape == (k, points.shape[1])
    now, found = Codebook(start, lookup, emit), Clustering(start, torch.inf, 0, False)
    for head in _heads(len(points), k):
        if count_distinct(places[:head], enough=k) < k:  # repeats would only pull codes away from the points behind
            continue
        slabs = partial(_own, torch.split(points[:head], _slab(head, points.device)))
        found = _lloyd(slabs, points[:head], replace(now, vectors=found.centroids), iterations, tolerance, seed, watch)
    if whole is not None:
        slabs = partial(_in_slabs, whole, points.device)
        found = _lloyd(slabs, points, replace(now, vectors=found.centroids), iterations, tolerance, seed, watch)
    return found


def _heads(n: int, k: int) -> list[int]:
    heads = [n]
    while heads[0] >= _GROWTH * _POINTS_PER_CENTROID * k:
        heads.insert(0, heads[0] // _GROWTH)
    return heads


def _slab(points: int, device: torch.device) -> int:
    """How many of so many points are done at a time."""
    return min(_SLAB[device.type], max(_LEAST, points // _SLABS))


def _own(slabs: Iterable[Tensor]) -> Iterable[Tensor]:
    """Of slabs that every process has, those that are this one's work."""
    return islice(slabs, processes.rank(), None, processes.count())


def _in_slabs(whole: Latents, device: torch.device) -> Iterable[Tensor]:
    return (slab.to(device) for batch in whole for slab in torch.split(batch, _SLAB[device.type]))


@dataclass(frozen=True, eq=False)
class _Cells:
    """What falls to each code. sums: (k, dim) float64 of its points, hits: (k,) float64 how many. squares: float64, sum
    of the squared lengths of all points."""

    sums: Tensor
    hits: Tensor
    squares: Tensor

    @staticmethod
    def of(points: Tensor, codebook: Codebook) -> _Cells:
        """points: (n, dim)."""
        codes = _nearest(points, codebook)
        shown = unit(points) if codebook.emit is Emit.UNIT else points
        sums = shown.new_zeros((codebook.size, codebook.dim), dtype=torch.float64)
        squares = sums.new_zeros(())
        at_once = _WIDENED[points.device.type]
        for rows, at in zip(torch.split(shown, at_once), torch.split(codes, at_once), strict=True):
            wide = rows.double()
            sums.index_add_(0, at, wide)
            squares += torch.dot(wide.flatten(), wide.flatten())
        return _Cells(sums, torch.bincount(codes, minlength=codebook.size).double(), squares)

    @staticmethod
    def over(slabs: Iterable[Tensor], codebook: Codebook) -> _Cells:
        """Of all slabs, those of the other processes among them."""
        vectors = codebook.vectors
        sums = torch.zeros(vectors.shape, dtype=torch.float64, device=vectors.device)
        hits, squares = sums.new_zeros(codebook.size), sums.new_zeros(1)
        work = partial(_Cells.of, codebook=codebook)
        for found in map(work, slabs) if vectors.is_cuda else spread(work, slabs):
            sums += found.sums
            hits += found.hits
            squares += found.squares
        total = processes.summed(torch.cat([sums.flatten(), hits, squares]))
        parts = torch.split(total, [sums.numel(), len(hits), 1])
        return _Cells(parts[0].reshape(sums.shape), parts[1], parts[2])

    def means(self, old: Codebook) -> Tensor:
        """(k, dim) float32, as they are given out; where there are none, the old code."""
        means = (self.sums / self.hits.clamp(min=1)[:, None]).float()
        if old.emit is Emit.UNIT:
            means = unit(means)
        lost = (means == 0).all(1) if old.emit is Emit.UNIT else self.hits == 0  # directions may cancel out
        means[lost] = emitted(old)[lost]
        return means

    def inertia(self, vectors: Tensor) -> float:
        """Sum of squared distances of all points to the vectors (k, dim) of their cells."""
        wide = vectors.double()
        found = self.squares - 2 * (wide * self.sums).sum() + (self.hits * wide.square().sum(1)).sum()
        return max(0.0, float(found))


def _nearest(points: Tensor, codebook: Codebook) -> Tensor:
    """On a GPU by the kernel of flash-kmeans, where that is installed: it keeps no scores, and decides no near-ties."""
    flash = _flash_kmeans() if points.is_cuda and codebook.lookup is Lookup.EUCLIDEAN else None
    if flash is None:
        return nearest(points, codebook)
    found: Tensor = flash(points[None], codebook.vectors[None], points.square().sum(1)[None])
    return found[0].long()


@cache
def _flash_kmeans() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Nearest codes (1, n) of points (1, n, dim), codes (1, k, dim) and the points' squared lengths (1, n)."""
    if find_spec("flash_kmeans") is None:
        return None
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    found: Callable[[Tensor, Tensor, Tensor], Tensor] = euclid_assign_triton
    return found


def _lloyd(
    slabs: Callable[[], Iterable[Tensor]],
    points: Tensor,
    start: Codebook,
    iterations: int,
    tolerance: float,
    seed: int,
    watch: Watch,
) -> Clustering:
    """Iterate over the slabs until progress is below the tolerance. points: those that empty cells are moved to.

    The best means are kept, for momentum may overshoot. Raw centroids by the cosine do without it: the means of cells
    are not the best centroids that have these cells, and the inertia may rise by itself.
    """
    by_direction = start.lookup is Lookup.COSINE and start.emit is Emit.RAW
    now = before = start.vectors
    best, complete = Clustering(now, torch.inf, 0, False), False
    momentum, last, fell = _AS_IF, torch.inf, [torch.inf] * _LOOK_BACK
    for done in range(1, iterations + 1):
        cells = _Cells.over(slabs(), replace(start, vectors=now))
        means = cells.means(replace(start, vectors=now))
        judged = now if by_direction else means
        inertia = cells.inertia(judged)
        empty = (cells.hits == 0).nonzero()[:, 0]
        placed = len(empty) and _move(means, empty, points, start, seed + done)
        if (placed > 0, inertia) < (not complete, best.inertia):
            best, complete = Clustering(judged, inertia, done, False), not placed
        count = int(cells.hits.sum())
        watch.progress(f"k-means on {count:,} latents", done, None, inertia=inertia / count)
        if torch.equal(means, now) or (not placed and fell[0] - best.inertia <= tolerance * _LOOK_BACK * best.inertia):
            return replace(best, iterations=done, converged=True)
        fell = [*fell[1:], best.inertia]
        if by_direction:
            now = means
            continue
        momentum = momentum + 1 if inertia <= last else 0
        last = inertia
        ahead = now + _STRETCH * (means - now)
        now, before = ahead + max(0, momentum - 1) / (momentum + 2) * (ahead - before), ahead
        now[empty] = before[empty] = means[empty]
    return replace(best, iterations=iterations)


def _move(means: Tensor, empty: Tensor, points: Tensor, like: Codebook, seed: int) -> int:
    """Move the means of empty cells to points that are drawn by squared error; how many there were to be had."""
    full = torch.ones(len(means), dtype=torch.bool, device=means.device)
    full[empty] = False
    drawn = draw_by_error(points, replace(like, vectors=means[full]), len(empty), seed)
    means[empty[: len(drawn)]] = unit(drawn) if like.emit is Emit.UNIT else drawn
    return len(drawn)
