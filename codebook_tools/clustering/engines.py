"""Which k-means runs: the one of this package, faiss's or scikit-learn's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from codebook_tools.clustering.cells import Cells
from codebook_tools.clustering.kmeans import Clustering, kmeans
from codebook_tools.clustering.passes import nearby_from
from codebook_tools.clustering.seeding import Init, refuse_unfit, seeds
from codebook_tools.codebook import EUCLIDEAN, Codebook, Engine, Latents, Metric
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.optional import require
from codebook_tools.runtime.progress import Watch


@dataclass(frozen=True)
class Choice:
    """The engine that runs, and why."""

    engine: Engine
    reason: str


def chosen(engine: Engine, k: int, dim: int) -> Choice:
    """The engine that runs for k centroids of `dim` entries; of "auto" the native one, which was fastest at all sizes.

    The measurements are in benchmarks/results/kmeans.json.
    """
    if engine != "auto":
        return Choice(engine, "as asked")
    if k >= nearby_from(dim):
        return Choice("native", f"{k:,} codes of {dim} entries: it searches among neighbors, and moves codes")
    return Choice("native", f"{k:,} codes of {dim} entries: it starts on samples, and moves codes out of local optima")


def cluster(
    points: Tensor,
    k: int,
    *,
    engine: Engine = "auto",
    init: Init | Tensor = "kmeans++",
    iterations: int = 300,
    starts: int = 1,
    seed: int = 0,
    metric: Metric = EUCLIDEAN,
    weights: Tensor | None = None,
    whole: Latents | None = None,
    power: float = 2.0,
    watch: Watch,
) -> Clustering:
    """k-means by one of the engines.

    By cosine, faiss and scikit-learn cluster the directions; centroids of unit length are then their normalized means,
    raw ones the means of the points whose nearest direction they are.

    Args:
        points: (n, dim) float32, in an order in which each head is a uniform sample.
        k: Number of centroids.
        engine: Which k-means.
        init: How seeds are drawn, or the (k, dim) seeds themselves.
        iterations: Most iterations of Lloyd.
        starts: How often it is begun, with other seeds each time; the least inertia counts.
        seed: Of all that is drawn.
        metric: How centroids are searched and emitted; any but the dot product.
        weights: (n,) float64, of the points, above 0; None for 1.
        whole: What `points` are a sample of, to continue over; native alone takes it.
        power: Of the distance, whose mean is minimized; native alone takes another than 2.
        watch: Called with the progress of the native engine.

    Returns:
        The centroids and their inertia.

    Raises:
        CodebookError: The library is missing, there are fewer than k distinct points, or their distances overflow.
    """
    engine = chosen(engine, k, points.shape[1]).engine
    if engine != "native" and whole is not None:
        raise CodebookError(f"engine={engine} has no passes over latents that lie in files; use --engine native")
    if engine != "native" and power != 2:
        raise CodebookError(f"engine={engine} has no balanced k-means; use --engine native, or leave out --balance")
    best: Clustering | None = None
    for start in range(starts):
        if engine == "native":
            one = kmeans(
                points, k, init=init, iterations=iterations, seed=seed + start, metric=metric, weights=weights,
                whole=whole, power=power, watch=watch,
            )  # fmt: skip
        else:
            one = _by_library(engine, points, k, init, iterations, seed + start, metric, weights)
        best = one if best is None or one.inertia < best.inertia else best
    assert best is not None
    return best


def _by_library(
    engine: Engine, points: Tensor, k: int, init: Init | Tensor, iterations: int, seed: int, metric: Metric,
    weights: Tensor | None,
) -> Clustering:  # fmt: skip
    prepared = metric.prepare(points)
    refuse_unfit(prepared, k)
    start = metric.prepare(init) if isinstance(init, Tensor) else seeds(prepared, k, init, seed, weights)
    rows, first = prepared.cpu(), start.cpu()
    if engine == "faiss":
        vectors, done = _faiss(rows, first, iterations, seed, weights, metric.by_direction), iterations
    else:
        vectors, done = _sklearn(rows, first, iterations, seed, weights)
    codebook = Codebook(vectors.to(points.device), metric)
    if metric.by_direction:
        codebook = Codebook(Cells.over([(points, weights)], codebook).means(codebook), metric)
    inertia = Cells.over([(points, weights)], codebook).inertia(codebook.emitted)
    return Clustering(codebook.vectors, inertia, done, done < iterations)


def _faiss(
    points: Tensor, start: Tensor, iterations: int, seed: int, weights: Tensor | None, spherical: bool
) -> Tensor:
    """(k, dim), from seeds (k, dim). spherical: whether centroids are normalized after each iteration."""
    faiss = require("--engine faiss", "all", "faiss")
    run = faiss.Kmeans(
        points.shape[1], len(start), niter=iterations, seed=seed % 2**31, spherical=spherical,
        min_points_per_centroid=1, max_points_per_centroid=len(points),
    )  # fmt: skip
    rows = points.contiguous().numpy()
    run.train(rows, None if weights is None else weights.float().numpy(), init_centroids=start.contiguous().numpy())
    return torch.from_numpy(run.centroids.copy())


def _sklearn(points: Tensor, start: Tensor, iterations: int, seed: int, weights: Tensor | None) -> tuple[Tensor, int]:
    """(k, dim), from seeds (k, dim), and the number of iterations."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with _repeatable(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        run = KMeans(len(start), init=start.double().numpy(), n_init=1, max_iter=iterations, random_state=seed % 2**32)
        fit = run.fit(points.double().numpy(), sample_weight=None if weights is None else weights.numpy())
    return torch.from_numpy(fit.cluster_centers_).float(), int(fit.n_iter_)


@contextmanager
def _repeatable() -> Iterator[None]:
    """At most two threads, for the same bytes: scikit-learn adds the sums of its threads in the order they finish.

    a + b is b + a, but the sum of three or more rounds differently from run to run.
    """
    openmp = _openmp()
    with openmp.limit(limits=min([2, *(library["num_threads"] for library in openmp.info())])):
        yield


@cache
def _openmp() -> Any:
    """The OpenMP libraries of this process, which take milliseconds to find."""
    import sklearn.cluster  # noqa: F401  # so that its own is there to be found
    from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

    return ThreadpoolController().select(user_api="openmp")
