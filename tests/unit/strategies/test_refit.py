"""Prune and Re-Fit: numbers worked by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from points import column, normal

from codebook_tools.clustering.assignment import nearest
from codebook_tools.clustering.kmeans import kmeans
from codebook_tools.clustering.metric import COSINE, COSINE_UNIT, DOT
from codebook_tools.codebook import EUCLIDEAN, REMOVED, Codebook, Metric
from codebook_tools.data.latents import StoredLatents
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import Prune, Refit

NUMBERED = Codebook(torch.arange(5.0)[:, None] + torch.tensor([0.0, 0.5]))
NO_LATENTS = StoredLatents(torch.empty(0, 2))


@pytest.mark.parametrize(
    ("settings", "counts", "kept"),
    [
        ({}, [4, 0, 1, 0, 9], [0, 2, 4]),
        ({"threshold": 1}, [4, 0, 1, 0, 9], [0, 4]),
        ({"threshold": 4}, [4, 0, 1, 0, 9], [4]),
        ({}, [1, 1, 1, 1, 1], [0, 1, 2, 3, 4]),
        ({"keep": 2}, [4, 0, 1, 0, 9], [0, 4]),
        ({"keep": 3}, [2, 7, 2, 2, 2], [0, 1, 2]),  # among equals the lower index stays
        ({"keep": 4}, [5, 0, 0, 1, 0], [0, 1, 2, 3]),  # dead codes fill up, the lower index first
        ({"keep": 2}, [0, 0, 0, 0, 0], [0, 1]),
    ],
)
def test_prune_by_hand(settings: dict[str, Any], counts: list[int], kept: list[int]) -> None:
    pruned = Prune(**settings)(NUMBERED, NO_LATENTS, torch.tensor(counts))
    assert torch.equal(pruned.codebook.vectors, NUMBERED.vectors[kept])
    assert pruned.index_map.tolist() == [kept.index(code) if code in kept else REMOVED for code in range(5)]


def test_among_thousands_of_equally_used_codes_the_lower_indices_stay() -> None:
    counts = torch.full((5000,), 3)
    counts[4999] = 4
    pruned = Prune(keep=700)(Codebook(torch.arange(5000.0)[:, None]), NO_LATENTS, counts)
    assert pruned.codebook.vectors.flatten().tolist() == [*range(699), 4999]


# --- refit ---------------------------------------------------------------------------------------------------------

RECTANGLE = torch.tensor([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [10.0, 2.0]])


@pytest.mark.parametrize("init", ["kmeans++", "afkmc2", "used", "random"])
def test_refit_of_four_points_by_hand(init: Any) -> None:
    old, counts = Codebook(torch.tensor([[0.0, 1.0], [9.0, 1.0], [500.0, 500.0]])), torch.tensor([2, 2, 0])
    surgeries = [Refit(2, init, seed=seed)(old, StoredLatents(RECTANGLE, 3), counts) for seed in range(6)]
    assert all(surgery.index_map.tolist() == [REMOVED] * 3 for surgery in surgeries)
    # Uniform seeds may cut the rectangle the long way.
    assert any(sorted(surgery.codebook.vectors.tolist()) == [[0.0, 1.0], [10.0, 1.0]] for surgery in surgeries)
    whole = Refit(4, init)(old, StoredLatents(RECTANGLE), counts).codebook.vectors
    assert sorted(whole.tolist()) == RECTANGLE.tolist()


@pytest.mark.parametrize(
    ("codes", "points", "counts", "expected"),
    [
        # From the seeds 10 and 0, in this order, the cells are {9, 10, 11} and {0, 2}.
        ((0, 500, 10, 7), (0, 2, 9, 10, 11), [2, 0, 3, 0], [10, 1]),
        # Of equally used codes the lower index; 49 is nearer to 0 and 51 nearer to 100.
        ((100, 0, 50), (0, 1, 49, 51, 99, 101), [2, 2, 2], [251 / 3, 50 / 3]),
        # -3 was never used: the second seed comes from the points, and any of them parts 0 from the others.
        ((0, -3), (0, 10, 11, 12), [4, 0], [0, 11]),
    ],
)
def test_used_starts_lloyd_at_the_most_used_codes_in_order_of_use(
    codes: tuple[float, ...], points: tuple[float, ...], counts: list[int], expected: list[float]
) -> None:
    latents = StoredLatents(column(*points))
    refit = Refit(2, "used", iterations=1)(Codebook(column(*codes)), latents, torch.tensor(counts))
    assert refit.codebook.vectors.flatten().tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("init", "metric"),
    [("kmeans++", EUCLIDEAN), ("afkmc2", COSINE), ("random", COSINE_UNIT), ("used", EUCLIDEAN), ("used", COSINE)],
)
def test_refit_is_kmeans_by_the_metric_with_its_own_seed_and_iterations(init: Any, metric: Metric) -> None:
    points, old = normal(700, 4), Codebook(normal(30, 4, seed=1), metric)
    counts = torch.bincount(nearest(points, old), minlength=30)
    start = old.vectors[counts.argsort(descending=True, stable=True)[:9]] if init == "used" else init
    for seed, iterations in ((0, 2), (3, 300)):
        settings = {"iterations": iterations, "seed": seed, "metric": metric}
        expected = kmeans(points, 9, init=start, watch=Watch(), **settings).centroids
        refit = Refit(9, init, iterations, seed)(old, StoredLatents(points, 100), counts)
        assert torch.equal(refit.codebook.vectors, expected)


def test_refit_reports_progress() -> None:
    calls: list[str] = []
    watch = Watch(lambda what, done, total, figures: calls.append(what))
    Refit(2, watch=watch)(NUMBERED, StoredLatents(RECTANGLE), torch.tensor([1, 3, 0, 0, 0]))
    assert set(calls) == {"k-means on 4 latents"}


def test_refit_says_which_codebooks_it_has_no_kmeans_for() -> None:
    with pytest.raises(CodebookError, match="no k-means for dot lookup with raw rows"):
        Refit(2)(Codebook(NUMBERED.vectors, DOT), StoredLatents(RECTANGLE), torch.ones(5, dtype=torch.int64))
