"""k-means: Lloyd's iterations with momentum on growing samples, over all threads and processes."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import nearest, squared_errors
from codebook_tools.clustering.balanced import Emphasis
from codebook_tools.clustering.cells import Slab
from codebook_tools.clustering.neighbors import Neighbors
from codebook_tools.clustering.passes import InMemory, Streamed, slab_size
from codebook_tools.clustering.seeding import Init, count_distinct, draw_by_error, refuse_unfit, seeds
from codebook_tools.clustering.split_merge import split_and_merge
from codebook_tools.codebook import EUCLIDEAN, Codebook, Latents, Metric
from codebook_tools.runtime.progress import Watch

_GROWTH = 4  # size of each sample over the one before
_POINTS_PER_CENTROID = 16  # in the first sample, at least: with fewer, centroids fit noise
_ENOUGH_PER_CENTROID = 32  # for moves; smaller samples are iterated over to a rough tolerance only
_ROUGHLY = 1e-2
_NEIGHBORS = 32  # of a cell that it may be merged into
_PER_CENTROID = 8  # points that empty cells are moved to one of
_LEAST = 4096  # of either
_STRETCH = 1.3  # of each step to the means; more than 1.5 overshoots where cells are many
_AS_IF = 3  # iteration count that momentum starts at
_AT_MOST_ONE_IN = 8  # centroids is moved at a time
_ROUND = 2  # iterations after split-and-merge moves, before their gain is measured
_WORTH = 3e-3  # relative gain in inertia of a round for as many moves to follow; overlapping cells never reach it
_FEWER = 4  # times fewer moves after a round that gained less
_LOOK_BACK = 3  # iterations over which progress is measured: the inertia of single ones may rise


@dataclass(frozen=True, eq=False)
class Clustering:
    """The result of k-means.

    Attributes:
        centroids: (k, dim) float32.
        inertia: Sum of squared distances of all points to the centroids of the cells that these are the means of; to
            the nearest centroids it is at most that. By another power, the sum of that power of the distances.
        iterations: Of Lloyd over all points.
        converged: Whether the inertia had stopped falling by then.
    """

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
    weights: Tensor | None = None,
    power: float = 2.0,
    watch: Watch,
) -> Clustering:
    """Lloyd's k-means over all points (Lloyd 1982), in squared Euclidean distance or by cosine.

    Seeds come from a small head of the points, and Lloyd runs over heads that grow fourfold until all points take part:
    as good an optimum as from all points at once, in far fewer passes over all. On the first head that has enough
    points, split-and-merge moves lead out of a local optimum (split_merge.py). With many codes, most passes search
    among neighbors (passes.py). An empty cluster is moved to a point drawn by squared error. Each iteration overshoots
    the means and has momentum (Nesterov 1983) with restarts (O'Donoghue and Candès 2015).

    Args:
        points: (n, dim) float32, in an order in which each head is a uniform sample. The work is done on their device.
        k: Number of centroids.
        init: How seeds are drawn, or the (k, dim) seeds themselves, which get no split-and-merge moves.
        iterations: Most iterations over each head.
        tolerance: Relative gain in inertia of an iteration for another to follow.
        seed: Of all that is drawn.
        metric: How centroids are searched and emitted; any but the dot product. By cosine, centroids of unit length are
            mean directions (spherical k-means, Dhillon and Modha 2001), and raw ones the means of the points whose
            nearest direction they are.
        whole: What `points` are a sample of, to continue over. Then each process has its part of it, but the same
            `points` as all others.
        weights: (n,) float64, of the points, above 0; None for 1. All points take part from the first iteration then.
        power: Of the distance, whose mean is minimized: 2, or less for balanced cells (balanced.py).
        watch: Called with the progress.

    Returns:
        The centroids and their inertia.

    Raises:
        CodebookError: There are fewer than k distinct points, or their distances overflow.
    """
    assert k >= 1 and iterations >= 1 and metric.is_distance, (k, iterations, metric)
    prepared = metric.prepare(points)
    if isinstance(init, Tensor):
        refuse_unfit(prepared, k)
    start = init if isinstance(init, Tensor) else seeds(prepared, k, init, seed, weights, power)
    assert start.shape == (k, points.shape[1])
    like, clustering = Codebook(start, metric), Clustering(start, torch.inf, 0, False)
    is_fit, is_split = False, isinstance(init, Tensor) or not metric.minimizes_error
    for head in _heads(len(points), k) if weights is None else [len(points)]:
        is_fit = is_fit or count_distinct(prepared[:head], enough=k) == k
        if not is_fit:  # repeats would only pull codes away from the points behind
            continue
        passes = InMemory(points[:head], weights, k)
        level = _Level(passes, points[:head], like, tolerance, seed, watch, weights, power)
        enough = head >= _ENOUGH_PER_CENTROID * k or head == len(points)
        clustering = level.lloyd(clustering.centroids, iterations, tolerance if enough else max(tolerance, _ROUGHLY))
        if enough and not is_split:
            clustering, is_split = level.split_and_merge(clustering, iterations), True
    if whole is not None:
        streamed = Streamed(partial(_in_slabs, whole, points.device))
        level = _Level(streamed, points, like, tolerance, seed, watch, power=power)
        clustering = level.lloyd(clustering.centroids, iterations)
    return clustering


def _heads(n: int, k: int) -> list[int]:
    heads = [n]
    while heads[0] >= _GROWTH * max(_LEAST, _POINTS_PER_CENTROID * k):
        heads.insert(0, heads[0] // _GROWTH)
    return heads


def _in_slabs(whole: Latents, device: torch.device) -> Iterable[Slab]:
    at_once = slab_size(sys.maxsize, device)
    return ((slab.to(device), None) for batch in whole for slab in torch.split(batch, at_once))


@dataclass(frozen=True, eq=False)
class _Level:
    """Lloyd over one sample of the points.

    Attributes:
        passes: Over the sample.
        points: What empty cells are moved to.
        like: A codebook with the metric.
        tolerance: As of `kmeans`.
        seed: As of `kmeans`.
        watch: As of `kmeans`.
        weights: As of `kmeans`.
        power: As of `kmeans`.
    """

    passes: Streamed | InMemory
    points: Tensor
    like: Codebook
    tolerance: float
    seed: int
    watch: Watch
    weights: Tensor | None = None
    power: float = 2.0

    def lloyd(self, start: Tensor, iterations: int, tolerance: float | None = None) -> Clustering:
        """Iterate from start (k, dim) until progress is below the tolerance: that of the level, or another.

        The best means are kept, for momentum may overshoot. Where the search does not minimize the error, as with raw
        centroids by cosine, there is no momentum: the inertia may rise even without it. Where passes search among
        neighbors, one among all codes follows the last of them, and more of both where that one gains.
        """
        means_are_best = self.like.metric.minimizes_error
        emphasis = self._emphasis(start)
        tolerance = self.tolerance if tolerance is None else tolerance
        now = before = start
        best, complete = Clustering(now, torch.inf, 0, False), False
        momentum, last, fell = _AS_IF, torch.inf, [torch.inf] * _LOOK_BACK
        everywhere = not self.passes.is_local or tolerance > 0
        for done in range(1, iterations + 1):
            codebook = replace(self.like, vectors=now)
            cells = self.passes.cells(codebook, emphasis, everywhere)
            means = cells.means(codebook)
            kept = means if means_are_best and emphasis is None else now
            inertia = cells.inertia(kept)
            empty = cells.empty.nonzero()[:, 0].to(means.device)
            placed = len(empty) and self._move(means, empty, self.seed + done)
            if (placed > 0, inertia) < (not complete, best.inertia):
                best, complete = Clustering(kept, inertia, done, False), not placed
            total = float(cells.hits.sum())
            self.watch.progress(f"k-means on {total:,.0f} latents", done, None, inertia=inertia / total)
            gained = fell[0] - best.inertia
            fell = [*fell[1:], best.inertia]
            if torch.equal(means, now) or (not placed and gained <= tolerance * _LOOK_BACK * best.inertia):
                if everywhere or tolerance > self.tolerance:
                    return replace(best, iterations=done, converged=True)
                fell, everywhere = [best.inertia] * _LOOK_BACK, True
            else:
                everywhere = not self.passes.is_local
            if not means_are_best:
                now = means
                continue
            momentum = momentum + 1 if inertia <= last else 0
            last = inertia
            ahead = now + _STRETCH * (means - now)
            now, before = ahead + max(0, momentum - 1) / (momentum + 2) * (ahead - before), ahead
            now[empty] = before[empty] = means[empty]
        return replace(best, iterations=iterations)

    def _emphasis(self, start: Tensor) -> Emphasis | None:
        """The weights by distance that balance; None of plain k-means. start: (k, dim)."""
        if self.power == 2:
            return None
        return Emphasis.at(self.points, replace(self.like, vectors=start), self.power)

    def _weights(self, codebook: Codebook, codes: Tensor) -> Tensor | None:
        """(n,) float64: the weights of the points, with those by the distances to their codes (n,); None for 1."""
        if self.power == 2:
            return self.weights
        errors = squared_errors(self.points, codebook, codes)
        weights = Emphasis.of(errors, self.power).weights(errors)
        return weights if self.weights is None else weights * self.weights

    def _move(self, means: Tensor, empty: Tensor, seed: int) -> int:
        """Move the means of empty cells to points drawn by squared error. Returns how many could be moved."""
        full = torch.ones(len(means), dtype=torch.bool, device=means.device)
        full[empty] = False
        others, codes = replace(self.like, vectors=means[full]), self.passes.codes
        codes = nearest(self.points, others) if codes is None else (full.cumsum(0) - 1)[codes]
        weights = self._weights(others, codes)
        drawn, few = empty[:0], max(_LEAST, _PER_CENTROID * len(means))
        for head in [len(codes)] if weights is not None else [few, len(codes)]:
            if len(drawn) < len(empty):  # the few may be repeats
                drawn = draw_by_error(self.points[:head], others, len(empty), seed, weights, codes[:head])
        placed = empty[: len(drawn)]
        means[placed] = self.like.metric.emit(self.points[drawn])
        self.passes.place(drawn, placed)
        return len(drawn)

    def split_and_merge(self, best: Clustering, iterations: int) -> Clustering:
        """Rounds of split-and-merge moves with a few iterations after each: fewer moves once they gain little."""
        random = torch.Generator().manual_seed(self.seed % 2**63)
        at_once, left = len(best.centroids) // _AT_MOST_ONE_IN, iterations - best.iterations
        passes = self.passes
        assert isinstance(passes, InMemory)
        while at_once and left >= _ROUND:
            codebook = replace(self.like, vectors=best.centroids)
            codes, neighbors = passes.codes, passes.neighbors
            assert codes is not None
            neighbors = Neighbors.of(codebook, _NEIGHBORS).codes if neighbors is None else neighbors
            weights = self._weights(codebook, codes)
            moves = split_and_merge(codebook, self.points, codes, neighbors, at_once, random, weights)
            after = passes.moved(moves.into)
            new = replace(self, passes=after).lloyd(moves.vectors, _ROUND, tolerance=0)
            left -= _ROUND
            gain = best.inertia - new.inertia
            if gain <= _WORTH * best.inertia:
                at_once //= _FEWER
            if gain > 0:
                best, passes = replace(new, converged=best.converged), after
        if self.power == 2 and not passes.is_local:
            return best
        # Weighted means take more iterations to settle, and points may be missed by their nearest codes.
        return replace(self, passes=passes).lloyd(best.centroids, iterations)
