"""Every engine of k-means: as low an inertia as the others, with weights, unit rows and seeds that repeat."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from codebook_tools.clustering.engines import cluster
from codebook_tools.clustering.metric import COSINE, COSINE_UNIT
from codebook_tools.codebook import EUCLIDEAN, Engine, Metric
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.progress import Watch

ENGINES: tuple[Engine, ...] = ("native", "faiss", "sklearn")
each_engine = pytest.mark.parametrize("engine", ENGINES)


def blobs(n: int, centers: int, dim: int, spread: float, seed: int) -> Tensor:
    numbers = np.random.default_rng(seed)
    means = numbers.normal(size=(centers, dim))
    rows = means[numbers.integers(centers, size=n)] + spread * numbers.normal(size=(n, dim))
    return torch.from_numpy(rows.astype(np.float32))


SETS: dict[str, Callable[[], Tensor]] = {
    "apart": lambda: blobs(2000, 12, 8, 0.05, 0),
    "overlapping": lambda: blobs(4000, 40, 16, 0.8, 1),
    "normal": lambda: blobs(3000, 1, 4, 1.0, 2),
    "far from zero": lambda: blobs(2000, 30, 6, 0.4, 3) + 50,
    "heavy tails": lambda: torch.from_numpy(np.random.default_rng(4).standard_t(3, (3000, 5)).astype(np.float32)),
}


def run(points: Tensor, k: int, engine: Engine, metric: Metric = EUCLIDEAN, weights: Tensor | None = None, seed: int = 0) -> tuple[Tensor, float]:  # fmt: skip  # noqa: E501
    clustering = cluster(points, k, engine=engine, starts=4, seed=seed, metric=metric, weights=weights, watch=Watch())
    return clustering.centroids, clustering.inertia


def inertia_of(points: Tensor, centroids: Tensor, weights: Tensor | None = None) -> float:
    """In float64, by all distances."""
    errors = torch.cdist(points.double(), centroids.double()).square().amin(1)
    return float(errors.sum() if weights is None else (errors * weights).sum())


@pytest.mark.parametrize("name", SETS)
def test_engines_end_close_to_each_other_and_ours_within_two_percent_of_the_best(name: str) -> None:
    points = SETS[name]()
    ends = {}
    for engine in ENGINES:
        centroids, inertia = run(points, 12, engine)
        ends[engine] = inertia_of(points, centroids)
        assert inertia == pytest.approx(ends[engine], rel=2e-3)
    assert ends["native"] <= 1.02 * min(ends.values()) and max(ends.values()) <= 1.05 * min(ends.values()), ends


@each_engine
def test_a_weight_counts_as_so_many_copies(engine: Engine) -> None:
    points = blobs(300, 8, 3, 0.6, 5)
    counts = torch.from_numpy(np.random.default_rng(5).integers(1, 8, 300) ** 3)
    copies = points.repeat_interleave(counts, 0)
    centroids, inertia = run(points, 8, engine, weights=counts.double())
    least = min(inertia_of(copies, run(copies, 8, other)[0]) for other in ENGINES)
    assert inertia == pytest.approx(inertia_of(copies, centroids), rel=2e-3)
    assert inertia <= 1.02 * least
    without = inertia_of(copies, run(points, 8, engine)[0])
    assert without > 1.02 * inertia


@each_engine
def test_by_cosine_centroids_are_mean_directions_or_means_of_their_cells(engine: Engine) -> None:
    points = blobs(3000, 10, 6, 0.3, 6) * torch.rand(3000, 1, generator=torch.Generator().manual_seed(0)).add(0.5)
    directions = torch.nn.functional.normalize(points, dim=1)
    units, inertia = run(points, 10, engine, COSINE_UNIT)
    torch.testing.assert_close(units.norm(dim=1), torch.ones(10))
    assert inertia == pytest.approx(inertia_of(directions, units), rel=2e-3)
    assert inertia <= 1.02 * inertia_of(directions, run(points, 10, "native", COSINE_UNIT)[0])
    raw, _ = run(points, 10, engine, COSINE)
    codes = (directions @ torch.nn.functional.normalize(raw, dim=1).T).argmax(1)
    means = torch.stack([points[codes == code].mean(0) for code in range(10)])
    assert float((raw - means).norm() / means.norm()) < 0.02


@each_engine
def test_a_seed_repeats_and_another_differs(engine: Engine) -> None:
    points = blobs(3000, 1, 4, 1.0, 7)
    one, again, other = (run(points, 30, engine, seed=seed)[0] for seed in (3, 3, 90))
    assert torch.equal(one, again) and not torch.equal(one, other)


@each_engine
def test_what_cannot_be_clustered_is_an_error_in_words(engine: Engine) -> None:
    points = torch.ones(20, 2)
    with pytest.raises(CodebookError, match="k=3 asks for more codes than the 1 distinct"):
        run(points, 3, engine)
    if engine != "native":
        with pytest.raises(CodebookError, match="use --engine native"):
            cluster(points, 1, engine=engine, whole=[points], watch=Watch())
