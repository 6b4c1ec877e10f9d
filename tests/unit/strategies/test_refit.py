"""Prune and Re-Fit: numbers worked by hand; and the controls that a surgery has to beat."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from points import column, normal
from sklearn.cluster import kmeans_plusplus
from torch import Tensor

from codebook_tools.clustering.assignment import nearest
from codebook_tools.clustering.kmeans import kmeans
from codebook_tools.clustering.metric import COSINE, COSINE_UNIT, DOT
from codebook_tools.clustering.seeding import Init, seeds
from codebook_tools.codebook import EUCLIDEAN, REMOVED, Codebook, Metric
from codebook_tools.data.latents import StoredLatents
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import KmeansSeeds, Prune, RandomLatents, Refit, TopK

NUMBERED = Codebook(torch.arange(5.0)[:, None] + torch.tensor([0.0, 0.5]))
NO_LATENTS = StoredLatents(torch.empty(0, 2))


@pytest.mark.parametrize(("settings", "counts", "kept"), [
    ({}, [4, 0, 1, 0, 9], [0, 2, 4]), ({"threshold": 1}, [4, 0, 1, 0, 9], [0, 4]),
    ({"threshold": 4}, [4, 0, 1, 0, 9], [4]), ({}, [1, 1, 1, 1, 1], [0, 1, 2, 3, 4]),
    ({"keep": 2}, [4, 0, 1, 0, 9], [0, 4]), ({"keep": 2}, [0, 0, 0, 0, 0], [0, 1]),
    ({"keep": 3}, [2, 7, 2, 2, 2], [0, 1, 2]),  # among equals the lower index stays
    ({"keep": 4}, [5, 0, 0, 1, 0], [0, 1, 2, 3]),  # dead codes fill up, the lower index first
])  # fmt: skip
def test_prune_by_hand(settings: dict[str, Any], counts: list[int], kept: list[int]) -> None:
    pruned = Prune(**settings)(NUMBERED, NO_LATENTS, torch.tensor(counts))
    assert torch.equal(pruned.codebook.vectors, NUMBERED.vectors[kept])
    assert pruned.index_map.tolist() == [kept.index(code) if code in kept else REMOVED for code in range(5)]


def test_among_thousands_of_equally_used_codes_the_lower_indices_stay() -> None:
    counts = torch.full((5000,), 3)
    counts[4999] = 4
    pruned = Prune(keep=700)(Codebook(torch.arange(5000.0)[:, None]), NO_LATENTS, counts)
    assert pruned.codebook.vectors.flatten().tolist() == [*range(699), 4999]


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


@pytest.mark.parametrize(("codes", "points", "counts", "expected"), [
    # From the seeds 10 and 0, in this order, the cells are {9, 10, 11} and {0, 2}.
    ((0, 500, 10, 7), (0, 2, 9, 10, 11), [2, 0, 3, 0], [10, 1]),
    # Of equally used codes the lower index; 49 is nearer to 0 and 51 nearer to 100.
    ((100, 0, 50), (0, 1, 49, 51, 99, 101), [2, 2, 2], [251 / 3, 50 / 3]),
    # -3 was never used: the second seed comes from the points, and any of them parts 0 from the others.
    ((0, -3), (0, 10, 11, 12), [4, 0], [0, 11]),
])  # fmt: skip
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


each_init = pytest.mark.parametrize("init", ["kmeans++", "afkmc2", "random"])
each_control = pytest.mark.parametrize(("init", "control"), [("random", RandomLatents), ("kmeans++", KmeansSeeds)])
COUNTS = torch.tensor([4, 0, 1, 0, 9])


@pytest.mark.parametrize("k", [1, 3, 4, 5])
def test_top_k_is_pruning_down_to_k(k: int) -> None:
    top, pruned = (strategy(NUMBERED, NO_LATENTS, COUNTS) for strategy in (TopK(k), Prune(keep=k)))
    assert torch.equal(top.codebook.vectors, pruned.codebook.vectors)
    assert torch.equal(top.index_map, pruned.index_map)


@each_control
def test_codes_are_the_distinct_seeds_of_kmeans_whatever_the_old_ones_were(init: Init, control: Any) -> None:
    points = normal(200, 2)
    for k, seed in ((1, 0), (20, 5), (200, 0), (9, -1), (9, 2**63)):
        surgery = control(k, seed=seed)(NUMBERED, StoredLatents(points, 30), COUNTS)
        rows = {*map(tuple, surgery.codebook.vectors.tolist())}
        assert torch.equal(surgery.codebook.vectors, seeds(points, k, init, seed))
        assert len(rows) == k and rows <= {*map(tuple, points.tolist())} and surgery.index_map.tolist() == [REMOVED] * 5
        other = control(k, seed=seed)(Codebook(NUMBERED.vectors[:2] + 9), StoredLatents(points), torch.tensor([0, 0]))
        assert torch.equal(surgery.codebook.vectors, other.codebook.vectors)


def test_random_latents_are_drawn_alike() -> None:
    """Two of 0, 1, 2, 30: each of six pairs a sixth of the time, however far they lie apart."""
    points, draws = column(0, 1, 2, 30), 1200
    pairs = Counter(frozenset(seeds(points, 2, "random", seed).flatten().tolist()) for seed in range(draws))
    assert len(pairs) == 6
    assert all(count / draws == pytest.approx(1 / 6, abs=4 * (5 / 36 / draws) ** 0.5) for count in pairs.values())


def test_kmeans_seeds_leave_as_little_error_as_scikit_learns() -> None:
    """Both draw a few points for each seed and keep the best: means over twenty draws, which are unlike."""
    points, k = normal(400, 3), 20

    def mean_error(draws: list[Tensor]) -> float:
        return float(np.mean([float(torch.cdist(points, rows).amin(1).square().sum()) for rows in draws]))

    theirs = [torch.from_numpy(kmeans_plusplus(points.numpy(), k, random_state=seed)[0]) for seed in range(20)]
    ours = [seeds(points, k, "kmeans++", seed) for seed in range(20)]
    assert mean_error(ours) == pytest.approx(mean_error(theirs), rel=0.04)


@each_init
def test_seeds_come_from_the_first_head_unless_repeats_crowd_it(init: Init) -> None:
    """It has 4,096 points, of more than 1,024 seeds eight a seed."""
    points = column(*range(13_000))
    drawn = torch.cat([seeds(points, 2, init, seed) for seed in range(60)])
    assert 2000 < drawn.max() < 4096
    assert 2000 < seeds(points, 800, init, 0).max() < 4096 and 8000 < seeds(points, 1100, init, 0).max() < 8800
    crowded = torch.cat([torch.zeros(5000, 1), torch.arange(1.0, 3000)[:, None]])
    assert torch.cat([seeds(crowded, 2, init, seed) for seed in range(10)]).max() > 1500


@pytest.mark.parametrize("init", ["kmeans++", "afkmc2"])
def test_careful_seeds_never_stand_at_one_place_twice(init: Init) -> None:
    for seed in range(60):
        points = torch.randint(-3, 4, (30, 1), generator=torch.Generator().manual_seed(seed)).float()
        distinct = len(points.unique())
        for k in (1, 1 + seed % distinct, distinct):
            assert len(seeds(points, k, init, seed).unique()) == k
