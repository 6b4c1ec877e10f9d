"""k-means: Lloyd's iterations with momentum, on samples that grow, over as many threads and processes as there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from codebook_tools.clustering.cells import Cells
from codebook_tools.clustering.seeding import Init, count_distinct, draw_by_error, refuse_unfit, seeds
from codebook_tools.clustering.split_merge import swapped
from codebook_tools.codebook import EUCLIDEAN, Codebook, Latents, Metric
from codebook_tools.runtime import distributed
from codebook_tools.runtime.progress import Watch

_GROWTH = 4  # each sample is so many times the one before
_POINTS_PER_CENTROID = 32  # in the first sample, at least: fewer fit what is chance in it
_SLAB, _ELSEWHERE = {"cpu": 65_536}, 1 << 20  # points at most that one thread, or a GPU, assigns and sums at a time
_SLABS = 16  # at least, so that all threads have work: not as many as there are threads, or results would hang on that
_LEAST = 4096  # points of a slab even so: fewer take longer to begin than to do
_STRETCH = 1.3  # of each step to the means; more than 1.5 overshoots where cells are many
_AS_IF = 3  # iterations that momentum starts as if they had been made
_AT_MOST_ONE_IN = 8  # centroids is swapped at a time
_ROUND = 2  # iterations after swaps: they are judged by what they lead to
_WORTH = 3e-3  # share of the inertia that a round must gain for as many swaps to follow; where cells overlap, none does
_FEWER = 4  # times, after one that did not
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
    metric: Metric = EUCLIDEAN,
    whole: Latents | None = None,
    watch: Watch,
) -> Clustering:
    """Lloyd's k-means over all points (Lloyd 1982), in squared Euclidean distance, or by the cosine.

    points: (n, dim) float32, in an order in which each head is a uniform sample (Survey.sample is); where the work is
    done is where they are. Seeds come from a small head, and Lloyd runs over heads that grow fourfold until all points
    take part: as good an optimum as from all points at once, in far fewer passes over all. On the first head centroids
    are swapped, too, out of an optimum that is only local (split_merge.py), unless the seeds were given. A cluster that
    empties is moved to a point drawn by squared error. init: how seeds are drawn, or the (k, dim) seeds themselves.
    iterations: the most of them, over each head. tolerance: share of the inertia that an iteration must gain for more
    to follow. metric: how centroids are searched and emitted. By the cosine, those at unit length are mean directions
    (spherical k-means, Dhillon and Modha 2001), and raw ones the means of the points that they are the nearest
    direction of. There is none for the dot product. whole: what `points` are a sample of, to go on over; then each
    process has its part of it, where it has the same `points` as all others.

    Each iteration goes beyond the means and on in the direction of the last ones (Nesterov 1983), until that fails
    (O'Donoghue and Candès 2015). Raises CodebookError where there are fewer than k distinct points.
    """
    assert k >= 1 and iterations >= 1 and metric.is_distance, (k, iterations, metric)
    places = metric.prepare(points)
    refuse_unfit(places, k)
    given = isinstance(init, Tensor)
    start = init if isinstance(init, Tensor) else seeds(places, k, init, seed)
    assert start.shape == (k, points.shape[1])
    like, found = Codebook(start, metric), Clustering(start, torch.inf, 0, False)
    for head in _heads(len(points), k):
        if count_distinct(places[:head], enough=k) < k:  # repeats would only pull codes away from the points behind
            continue
        slabs = partial(_own, torch.split(points[:head], _slab(head, points.device)))
        level, at_first = _Level(slabs, points[:head], like, tolerance, seed, watch), found.iterations == 0
        found = level.lloyd(found.centroids, iterations)
        if at_first and not given and metric.minimizes_error:
            found = level.swaps(found, iterations)
    if whole is not None:
        slabs = partial(_in_slabs, whole, points.device)
        found = _Level(slabs, points, like, tolerance, seed, watch).lloyd(found.centroids, iterations)
    return found


def _heads(n: int, k: int) -> list[int]:
    heads = [n]
    while heads[0] >= _GROWTH * _POINTS_PER_CENTROID * k:
        heads.insert(0, heads[0] // _GROWTH)
    return heads


def _slab(points: int, device: torch.device) -> int:
    """How many of so many points are done at a time."""
    return min(_SLAB.get(device.type, _ELSEWHERE), max(_LEAST, points // _SLABS))


def _own(slabs: Iterable[Tensor]) -> Iterable[Tensor]:
    """Of slabs that every process has, those that are this one's work."""
    return islice(slabs, distributed.rank(), None, distributed.count())


def _in_slabs(whole: Latents, device: torch.device) -> Iterable[Tensor]:
    at_once = _SLAB.get(device.type, _ELSEWHERE)
    return (slab.to(device) for batch in whole for slab in torch.split(batch, at_once))


@dataclass(frozen=True, eq=False)
class _Level:
    """Points that are iterated over. slabs: all of them, anew at each call, or a process's own. points: those that
    empty cells are moved to. like: how centroids are searched and emitted. tolerance, seed: as of `kmeans`."""

    slabs: Callable[[], Iterable[Tensor]]
    points: Tensor
    like: Codebook
    tolerance: float
    seed: int
    watch: Watch

    def lloyd(self, start: Tensor, iterations: int, tolerance: float | None = None) -> Clustering:
        """Iterate from start (k, dim) until progress is below the tolerance, or another one.

        The best means are kept, for momentum may overshoot. Where the search does not minimize the error, as with raw
        centroids by the cosine, there is none: there the inertia may rise by itself.
        """
        means_are_best = self.like.metric.minimizes_error
        tolerance = self.tolerance if tolerance is None else tolerance
        now = before = start
        best, complete = Clustering(now, torch.inf, 0, False), False
        momentum, last, fell = _AS_IF, torch.inf, [torch.inf] * _LOOK_BACK
        for done in range(1, iterations + 1):
            codebook = replace(self.like, vectors=now)
            cells = Cells.over(self.slabs(), codebook)
            means = cells.means(codebook)
            judged = means if means_are_best else now
            inertia = cells.inertia(judged)
            empty = cells.empty.nonzero()[:, 0].to(means.device)
            placed = len(empty) and self._move(means, empty, self.seed + done)
            if (placed > 0, inertia) < (not complete, best.inertia):
                best, complete = Clustering(judged, inertia, done, False), not placed
            count = int(cells.hits.sum())
            self.watch.progress(f"k-means on {count:,} latents", done, None, inertia=inertia / count)
            gained = fell[0] - best.inertia
            if torch.equal(means, now) or (not placed and gained <= tolerance * _LOOK_BACK * best.inertia):
                return replace(best, iterations=done, converged=True)
            fell = [*fell[1:], best.inertia]
            if not means_are_best:
                now = means
                continue
            momentum = momentum + 1 if inertia <= last else 0
            last = inertia
            ahead = now + _STRETCH * (means - now)
            now, before = ahead + max(0, momentum - 1) / (momentum + 2) * (ahead - before), ahead
            now[empty] = before[empty] = means[empty]
        return replace(best, iterations=iterations)

    def _move(self, means: Tensor, empty: Tensor, seed: int) -> int:
        """Move the means of empty cells to points that are drawn by squared error; how many there were to be had."""
        full = torch.ones(len(means), dtype=torch.bool, device=means.device)
        full[empty] = False
        drawn = draw_by_error(self.points, replace(self.like, vectors=means[full]), len(empty), seed)
        means[empty[: len(drawn)]] = self.like.metric.emit(drawn)
        return len(drawn)

    def swaps(self, found: Clustering, iterations: int) -> Clustering:
        """Swap some centroids at a time, and iterate a little after each: ever fewer, once that gains little."""
        random = torch.Generator().manual_seed(self.seed % 2**63)
        at_once, left = len(found.centroids) // _AT_MOST_ONE_IN, iterations - found.iterations
        while at_once and left >= _ROUND:
            start = swapped(replace(self.like, vectors=found.centroids), self.points, at_once, random)
            new = self.lloyd(start, _ROUND, tolerance=0)
            left -= _ROUND
            gain = found.inertia - new.inertia
            if gain <= _WORTH * found.inertia:
                at_once //= _FEWER
            if gain > 0:
                found = replace(new, converged=found.converged)
        return found
