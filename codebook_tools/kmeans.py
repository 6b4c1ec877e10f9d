"""k-means: seeding, and Lloyd's iterations to convergence. The driver is here, the kernels are scikit-learn's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codebook_tools.assignment import nearest, squared_errors, unit
from codebook_tools.codebook import Codebook, Emit, Latents, Lookup
from codebook_tools.errors import CodebookError
from codebook_tools.watch import Watch

Init = Literal["kmeans++", "afkmc2", "random"]

_GROWTH = 4  # each sample is so many times the one before
_POINTS_PER_CENTROID = 64  # in the first sample: enough for seeds, few enough to be quick
_BLOCK = 10  # iterations between two reports of progress
_FLAT = 1e-3  # converged when a block of iterations lowers the inertia by less than this share; seeds differ by 1e-2


@dataclass(frozen=True, eq=False)
class Clustering:
    """centroids: (k, dim) float32. inertia: sum of squared distances of all points to their centroids, at the end.
    iterations: of Lloyd over all points. converged: whether the inertia had stopped falling by then."""

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
    seed: int = 0,
    lookup: Lookup = Lookup.EUCLIDEAN,
    emit: Emit = Emit.RAW,
    whole: Latents | None = None,
    watch: Watch,
) -> Clustering:
    """Lloyd's k-means over all points (Lloyd 1982), in squared Euclidean distance, or by the cosine.

    points: (n, dim) float32, in an order in which each head is a uniform sample (Survey.sample is). Seeds come from the
    first head, and Lloyd runs to convergence on heads that grow fourfold until all points take part: as good an optimum
    as from all points at once, in far fewer passes over all. A cluster that empties is moved to the point with the
    largest error. init: how seeds are drawn, or the (k, dim) seeds themselves. iterations: the most of them, over each
    head. lookup, emit: how centroids are searched and given out. By the cosine, those at unit length are mean
    directions (spherical k-means, Dhillon and Modha 2001), and raw ones the means of the points that they are the
    nearest direction of. There is none for the dot product. Raises CodebookError where there are fewer than k distinct
    points.
    """
    assert k >= 1 and iterations >= 1 and lookup is not Lookup.DOT, (k, iterations, lookup)
    places = points if lookup is Lookup.EUCLIDEAN else unit(points)
    _refuse_too_few(places, k)
    centroids = init if isinstance(init, Tensor) else seeds(places, k, init, seed)
    assert centroids.shape == (k, points.shape[1])
    lloyd = _lloyd if lookup is Lookup.EUCLIDEAN else partial(_cosine_lloyd, emit)
    result = None
    for head in _heads(len(points), k):
        result = lloyd(points[:head], centroids, iterations, watch)
        centroids = result.centroids
    assert result is not None
    return result if whole is None else _whole_lloyd(whole, result.centroids, iterations, lookup, emit)


def _whole_lloyd(whole: Latents, centroids: Tensor, iterations: int, lookup: Lookup, emit: Emit) -> Clustering:
    before, done = np.inf, 0
    while True:
        book = Codebook(centroids, lookup, emit)
        sums, hits, inertia = torch.zeros(centroids.shape, dtype=torch.float64), torch.zeros(len(centroids)), 0.0
        for rows in whole:
            codes = nearest(rows, book)
            sums.index_add_(0, codes, rows.double())
            hits += torch.bincount(codes, minlength=len(hits))
            inertia += float(squared_errors(rows, book, codes).double().sum())
        converged = before - inertia <= _FLAT / _BLOCK * inertia
        if done == iterations or converged:
            return Clustering(centroids, inertia, done, converged)
        centroids = torch.where(hits[:, None] > 0, (sums / hits.clamp(min=1)[:, None]).float(), centroids)
        before, done = inertia, done + 1


def _refuse_too_few(points: Tensor, k: int) -> None:
    distinct = count_distinct(points, enough=k)
    if distinct < k:
        raise CodebookError(
            f"k={k} asks for more codes than the {distinct} distinct latents; "
            f"use --k {distinct} or less, or give more data"
        )


def count_distinct(points: Tensor, enough: int) -> int:
    """Distinct rows of points (n, dim), at most `enough`: heads are tried first, for few points usually suffice."""
    head = min(len(points), 4 * enough)
    while True:
        found = len(np.unique(points[:head].numpy(), axis=0))
        if found >= enough or head == len(points):
            return min(found, enough)
        head = min(len(points), 8 * head)


def _heads(n: int, k: int) -> list[int]:
    heads = [n]
    while heads[0] > _GROWTH * _POINTS_PER_CENTROID * k:
        heads.insert(0, heads[0] // _GROWTH)
    return heads


def _lloyd(points: Tensor, start: Tensor, iterations: int, watch: Watch) -> Clustering:
    from sklearn.cluster import KMeans

    done, inertia, converged = 0, np.inf, False
    data, centroids = points.contiguous().numpy(), start.numpy()
    rows, copies = _distinct(data)
    if len(rows) < len(centroids):  # a head of repeats would only pull centroids away from the points behind it
        return Clustering(start, inertia, done, converged)
    while done < iterations and not converged:
        block = min(_BLOCK, iterations - done)
        # tol=0: scikit-learn stops early only when no label changes. It re-seeds empty clusters itself.
        model = KMeans(len(centroids), init=centroids, n_init=1, max_iter=block, tol=0, algorithm="lloyd")
        with repeatable():
            fit = model.fit(rows, sample_weight=copies)
        centroids, done = fit.cluster_centers_, done + fit.n_iter_
        converged = fit.n_iter_ < block or inertia - fit.inertia_ <= _FLAT * fit.inertia_
        inertia = float(fit.inertia_)
        watch.progress(f"k-means on {len(data):,} latents", done, None, inertia=inertia / len(data))
    return Clustering(torch.from_numpy(centroids), inertia, done, converged)


def _cosine_lloyd(emit: Emit, points: Tensor, start: Tensor, iterations: int, watch: Watch) -> Clustering:
    """As `_lloyd`, by the cosine. Of raw centroids the inertia may rise again: the best are kept."""
    rows = unit(points) if emit is Emit.UNIT else points
    now = Codebook(start, Lookup.COSINE, emit)
    best, done, converged, before = Clustering(start, np.inf, 0, False), 0, False, np.inf
    while True:
        codes = nearest(rows, now)
        errors = squared_errors(rows, now, codes)
        inertia = float(errors.double().sum())
        if inertia < best.inertia:
            best = Clustering(now.vectors, inertia, done, False)
        if done % _BLOCK == 0:
            converged, before = before - best.inertia <= _FLAT * best.inertia, best.inertia
            watch.progress(f"k-means on {len(rows):,} latents", done, None, inertia=inertia / len(rows))
        if done == iterations or converged:
            return replace(best, iterations=done, converged=converged)
        means = _means(rows, codes, errors, now.vectors)
        if emit is Emit.UNIT:  # directions that cancel out have no mean: the old one stays
            means = torch.where(means.norm(dim=1, keepdim=True) > 0, unit(means), now.vectors)
        now, done = replace(now, vectors=means), done + 1


def _means(rows: Tensor, codes: Tensor, errors: Tensor, old: Tensor) -> Tensor:
    """(k, dim) means of the rows of each code; one without rows moves to a row of the largest error."""
    sums = torch.zeros(old.shape, dtype=torch.float64).index_add_(0, codes, rows.double())
    hits = torch.bincount(codes, minlength=len(old))
    means = (sums / hits.clamp(min=1)[:, None]).float()
    empty = (hits == 0).nonzero()[:, 0]
    means[empty] = rows[errors.argsort(descending=True, stable=True)[: len(empty)]]
    return means


def _distinct(data: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The distinct rows of data (n, dim), in order of their first, and how often each stands there.

    Flat regions of images repeat one latent thousands of times. Rounding may tell its copies apart, and so keep two
    centroids at one place for good; and empty clusters would all move to copies of the point with the largest error.
    """
    rows = data + 0  # -0 becomes 0: equal rows are told by their bytes
    _, first, copies = np.unique(rows.view(f"V{rows.itemsize * rows.shape[1]}"), return_index=True, return_counts=True)
    order = np.argsort(first)
    return data[first[order]], copies[order]


@contextmanager
def repeatable() -> Iterator[None]:
    """At most two threads: scikit-learn adds up the sums of its threads in the order in which they finish.

    a + b is b + a, but the sum of three or more would round differently from run to run.
    """
    openmp = _openmp()
    with openmp.limit(limits=min([2, *(library["num_threads"] for library in openmp.info())])):
        yield


@cache
def _openmp() -> Any:
    """The OpenMP libraries of this process, scikit-learn's among them. It takes milliseconds to find them."""
    import sklearn.cluster  # noqa: F401  # so that its own is there to be found
    from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

    return ThreadpoolController().select(user_api="openmp")


def seeds(points: Tensor, k: int, init: Init, seed: int) -> Tensor:
    """(k, dim) seeds for k-means: some of the points.

    points: (n, dim) float32, in an order in which each head is a uniform sample: the first head gives the seeds, unless
    it is so full of repeats that it has fewer than k distinct points. Raises CodebookError where all have fewer.
    """
    _refuse_too_few(points, k)
    head = points[: _heads(len(points), k)[0]]
    data = (head if count_distinct(head, enough=k) == k else points).contiguous().numpy()
    rng = np.random.default_rng(seed % 2**64)  # numpy takes no negative seed
    if init == "kmeans++":
        from sklearn.cluster import kmeans_plusplus

        return torch.from_numpy(kmeans_plusplus(data, k, random_state=int(rng.integers(2**31)))[0])
    if init == "afkmc2":
        return torch.from_numpy(afkmc2(data, k, rng))
    return torch.from_numpy(data[rng.choice(len(data), k, replace=False)])


def draw_by_error(points: Tensor, codebook: Codebook, n: int, seed: int) -> Tensor:
    """(n, dim) of the points, drawn one after the other by squared error to the codes and to those drawn before.

    This is k-means++ seeding (Arthur and Vassilvitskii 2007) that goes on from codes that are there.
    points: (m, dim), in an order in which each head is a uniform sample: of more than 65,536, or 128 for each draw, a
    head does, unless it has too few that differ. Fewer than n rows where no more points differ from the codes.
    """
    head = points[: max(65_536, 128 * n)]
    found = _drawn(head, codebook, n, seed)
    return found if len(found) == n or len(head) == len(points) else _drawn(points, codebook, n, seed)


def _drawn(points: Tensor, codebook: Codebook, n: int, seed: int) -> Tensor:
    errors = squared_errors(points, codebook, nearest(points, codebook)).double()
    places = unit(points) if (codebook.lookup, codebook.emit) == (Lookup.COSINE, Emit.UNIT) else points
    random = torch.Generator().manual_seed(seed)
    drawn: list[int] = []
    while len(drawn) < n:
        up_to = errors.cumsum(0)
        total = float(up_to[-1])
        if not total > 0:
            break
        at = float(torch.rand((), generator=random, dtype=torch.float64)) * total
        drawn.append(min(int(torch.searchsorted(up_to, at, right=True)), len(points) - 1))
        errors = torch.minimum(errors, (places - places[drawn[-1]]).square().sum(1).double())
    return points[drawn]


def afkmc2(data: NDArray[np.float32], k: int, rng: np.random.Generator, chain: int = 200) -> NDArray[np.float32]:
    """(k, dim) seeds by Markov chains that approximate k-means++ in one pass over the data.

    Each seed is the end of a chain of `chain` proposals, drawn half by squared distance to the first seed, half alike.
    Source: Bachem, Lucic, Hassani and Krause 2016, "Fast and Provably Good Seedings for k-Means", algorithm 1.
    """
    from scipy.spatial.distance import cdist

    seeds: NDArray[np.float32] = data[rng.integers(len(data))][None]
    proposal = ((data - seeds[0]) ** 2).sum(1, dtype=np.float64)
    spread = proposal.sum()
    proposal = proposal / max(spread, np.finfo(np.float64).tiny) + 1 / len(data)
    proposal /= proposal.sum()
    for _ in range(k - 1):
        candidates = rng.choice(len(data), chain, p=proposal)
        nearest = cdist(data[candidates], seeds, "sqeuclidean").min(1)
        draws = rng.random(chain)
        at = 0
        for step in range(1, chain):
            x, y = candidates[at], candidates[step]
            if nearest[step] * proposal[x] > draws[step] * nearest[at] * proposal[y]:
                at = step
        seeds = np.concatenate([seeds, data[candidates[at]][None]])
    return seeds
