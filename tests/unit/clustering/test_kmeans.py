"""k-means: against scikit-learn, by hand, and where points repeat, crowd or run out; and its split-and-merge moves."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from points import blobs, column, normal
from sklearn.cluster import KMeans
from torch import Tensor

from codebook_tools.clustering.assignment import nearest, squared_errors
from codebook_tools.clustering.kmeans import Clustering, kmeans
from codebook_tools.clustering.metric import COSINE, COSINE_UNIT, unit
from codebook_tools.clustering.neighbors import Neighbors
from codebook_tools.clustering.seeding import Init, afkmc2, count_distinct
from codebook_tools.clustering.split_merge import Moves, split_and_merge
from codebook_tools.codebook import EUCLIDEAN, Codebook, Metric
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.progress import Watch

INITS: tuple[Init, ...] = ("kmeans++", "afkmc2", "random")
each_init = pytest.mark.parametrize("init", INITS)


def inertia_of(points: Tensor, centroids: Tensor) -> float:
    """Sum of squared distances to the nearest centroid, in float64, by brute force."""
    return float(torch.cdist(points.double(), centroids.double()).amin(1).square().sum())


def run(points: Tensor, k: int, **settings: Any) -> Clustering:
    """To a tolerance that leaves no more than a ten-thousandth to gain."""
    return kmeans(points, k, tolerance=1e-5, watch=Watch(), **settings)


def by_scikit_learn(points: Tensor, k: int, iterations: int) -> Any:
    """Lloyd from the first k points."""
    return KMeans(k, init=points[:k].numpy(), n_init=1, max_iter=iterations, tol=0).fit(points.numpy())


def used(points: Tensor, clustering: Clustering, metric: Metric = EUCLIDEAN) -> int:
    """How many centroids are nearest to a point."""
    return len(nearest(points, Codebook(clustering.centroids, metric)).unique())


# --- against others and by hand ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "k", "dim"), [(500, 1, 7), (400, 3, 2), (2000, 7, 1), (1500, 20, 16)])
def test_the_same_start_ends_as_low_as_scikit_learn_or_lower(count: int, k: int, dim: int) -> None:
    """Few enough points that there is one head: then it is Lloyd from the given seeds, nothing else."""
    points = normal(count, dim, seed=k)
    before = points.clone()
    reference = by_scikit_learn(points, k, 300)
    result = run(points, k, init=points[:k])
    assert result.centroids.dtype == torch.float32 and result.centroids.shape == (k, dim)
    # Momentum may carry it past a shallow optimum; it stops a little before scikit-learn's tol=0.
    assert reference.inertia_ * 0.98 <= result.inertia <= reference.inertia_ * 1.001
    assert result.inertia == pytest.approx(inertia_of(points, result.centroids), rel=1e-4)  # not of the last means
    assert torch.equal(points, before)


def test_momentum_needs_a_fraction_of_the_iterations() -> None:
    """Many cells in a smooth cloud: where Lloyd alone creeps."""
    points, k = normal(8000, 8), 100
    alone = by_scikit_learn(points, k, 60)
    assert run(points, k, init=points[:k], iterations=30).inertia < alone.inertia_


@each_init
def test_growing_heads_end_as_low_as_scikit_learn_on_all_points_at_once(init: Init) -> None:
    points, k = normal(20_000, 4), 5  # heads of 5,000 and 20,000
    reference = min(KMeans(k, n_init=1, tol=0, random_state=s).fit(points.numpy()).inertia_ for s in range(5))
    result, first, other = run(points, k, init=init), *(run(points, k, init=init, iterations=1, seed=s) for s in (0, 1))
    assert result.inertia <= 1.01 * reference and not torch.equal(first.centroids, other.centroids)
    assert result.inertia == pytest.approx(inertia_of(points, result.centroids), rel=1e-4)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_the_most_iterations_are_kept_to_and_more_never_hurt() -> None:
    """The first is scikit-learn's."""
    points = normal(1100, 4)  # one head
    reference = by_scikit_learn(points, 9, 1)
    results = [run(points, 9, init=points[:9], iterations=n) for n in (1, 2, 5, 11, 300)]
    assert torch.allclose(results[0].centroids, torch.from_numpy(reference.cluster_centers_), atol=1e-5)
    assert not results[0].converged
    assert all(result.iterations <= n for result, n in zip(results, (1, 2, 5, 11, 300), strict=True))
    assert all(later.inertia <= earlier.inertia * (1 + 1e-6) for earlier, later in pairwise(results))
    assert results[-1].converged and results[-1].iterations < 300


def test_the_watch_gets_iterations_and_inertia() -> None:
    calls: list[tuple[str, int, dict[str, float]]] = []
    watch = Watch(lambda what, done, total, figures: calls.append((what, done, dict(figures))))
    result = kmeans(normal(20_000, 3), 5, watch=watch)
    assert [calls[0][0], calls[-1][:2]] == [
        "k-means on 5,000 latents",
        ("k-means on 20,000 latents", result.iterations),
    ]
    assert calls[-1][2]["inertia"] == pytest.approx(result.inertia / 20_000, rel=1e-4)


# --- seeding by Markov chains --------------------------------------------------------------------------------------


def test_afkmc2_draws_its_second_seed_in_proportion_to_squared_distance() -> None:
    """A long chain forgets its proposal. From the first seed 0 a point at 1 has weight 1, one at 3 has weight 9."""
    points = np.repeat(np.array([[0.0], [1.0], [3.0]], dtype=np.float32), 10, 0)
    second = {0.0: [], 1.0: [], 3.0: []}  # type: dict[float, list[float]]
    for seed in range(1200):
        first, other = afkmc2(points, 2, np.random.default_rng(seed), chain=50)[:, 0].tolist()
        second[first].append(other)
    for first, expected in ((0.0, 9 / 10), (1.0, 4 / 5), (3.0, 4 / 13)):  # of the farther, or of 1.0 from 3.0
        drawn = second[first]
        share = np.mean([x == (3.0 if first < 3 else 1.0) for x in drawn])
        assert len(drawn) > 300 and first not in drawn
        assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / len(drawn)) ** 0.5)


@pytest.mark.parametrize("chain", [1, 200])
def test_afkmc2_takes_points_that_are_all_alike(chain: int) -> None:
    points = np.full((40, 3), 7, dtype=np.float32)
    assert np.array_equal(afkmc2(points, 4, np.random.default_rng(0), chain), points[:4])


# --- repeats, crowds and limits ------------------------------------------------------------------------------------


@each_init
def test_rare_points_behind_a_crowded_head_get_codes_of_their_own(init: Init) -> None:
    """The heads that seeds and first iterations see hold one point, thousands of times."""
    rare = torch.arange(1.0, 20).repeat(2)[:, None].repeat(1, 2) + 100
    points = torch.cat([torch.zeros(6000, 2), rare])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # scikit-learn's about the head are not the user's business
        result = run(points, 20, init=init)
    assert result.inertia == pytest.approx(0, abs=1e-3) and used(points, result) == 20


@pytest.mark.parametrize(("count", "repeats"), [(5, 1), (1, 9), (40, 60)])
def test_more_codes_than_distinct_points_is_the_users_error_with_the_way_out(count: int, repeats: int) -> None:
    points = normal(count, 2).repeat(repeats, 1)
    message = rf"k={count + 1} asks for more codes than the {count} distinct latents; use --k {count} or .*more data"
    with pytest.raises(CodebookError, match=message):
        run(points, count + 1)
    assert len(run(points, count).centroids) == count


@pytest.mark.parametrize(("points", "start", "end"), [
    # scikit-learn moves both empty clusters to 50.0, which stands there ten times, and stops with one empty.
    ([0.0] * 20 + [1.0] * 20 + [50.0] * 10 + [9.0], [0.0, -900.0, -901.0, -902.0], [0, 1, 9, 50]),
    ([0.0, 1.0, 2.0, 50.0], [1.0, -900.0], [1, 50]),  # to the largest error
])  # fmt: skip
def test_empty_clusters_move_to_distinct_points_of_large_errors(points: Any, start: Any, end: list[float]) -> None:
    result = run(torch.tensor(points)[:, None], len(start), init=torch.tensor(start)[:, None])
    assert sorted(result.centroids.flatten().tolist()) == pytest.approx(end, abs=1e-4)


def test_the_inertia_is_no_less_than_that_of_the_codes_even_when_clusters_moved_last() -> None:
    points = torch.tensor([[0.0]] * 20 + [[1.0]] * 20 + [[50.0]] * 10)
    result = run(points, 3, init=torch.tensor([[0.0], [-900.0], [-901.0]]), iterations=1)
    assert result.iterations == 1 and not result.converged
    assert result.inertia >= inertia_of(points, result.centroids)


@each_init
@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_a_large_common_offset_costs_nothing(init: Init, offset: float) -> None:
    points = normal(2000, 4) + offset
    result, reference = run(points, 10, init=init), run((points.double() - offset).float(), 10, init=init)
    assert inertia_of(points, result.centroids) == pytest.approx(reference.inertia, rel=0.03)
    assert used(points, result) == 10


GRID = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=40)


@given(GRID, st.data())
def test_on_any_grid_codes_are_finite_used_and_never_worse_than_the_mean(
    rows: list[tuple[int, int]], data: st.DataObject
) -> None:
    points = torch.tensor(rows, dtype=torch.float32)
    k = data.draw(st.integers(1, len(set(rows))))
    result = run(points, k, init=data.draw(st.sampled_from(INITS)), seed=data.draw(st.integers(0, 5)))
    assert result.centroids.shape == (k, 2) and bool(torch.isfinite(result.centroids).all())
    assert result.inertia == pytest.approx(inertia_of(points, result.centroids), rel=1e-4, abs=1e-4)
    assert result.inertia <= inertia_of(points, points.mean(0, keepdim=True)) + 1e-3
    assert used(points, result) == k


def test_distinct_points_are_counted_up_to_what_is_enough_wherever_they_are() -> None:
    assert count_distinct(torch.tensor([[0.0, 1.0], [-0.0, 1.0], [0.0, -1.0]]), 5) == 2
    points = torch.zeros(5000, 1)
    points[-9:] = torch.arange(1.0, 10)[:, None]
    assert [count_distinct(points, enough) for enough in (1, 9, 10, 11)] == [1, 9, 10, 10]


# --- by cosine -----------------------------------------------------------------------------------------------------

ANGLES = torch.tensor([0.0, 10.0, 20.0, 90.0, 100.0, 110.0]).deg2rad()
DIRECTIONS = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
LENGTHS = torch.tensor([1.0, 2.0, 6.0, 3.0, 1.0, 2.0])[:, None]


def test_centroids_of_unit_length_are_mean_directions_whatever_the_lengths() -> None:
    result = run(LENGTHS * DIRECTIONS, 2, metric=COSINE_UNIT, init=DIRECTIONS[[0, 5]])
    middle = torch.tensor([10.0, 100.0]).deg2rad()
    assert torch.allclose(result.centroids, torch.stack([middle.cos(), middle.sin()], 1), atol=1e-6)
    step = 2 - 2 * float(torch.tensor(10.0).deg2rad().cos())
    assert result.inertia == pytest.approx(4 * step, rel=1e-4) and result.converged


def test_raw_centroids_are_the_means_of_the_points_whose_direction_is_nearest() -> None:
    points = LENGTHS * DIRECTIONS
    result = run(points, 2, metric=COSINE, init=points[[0, 5]])
    assert torch.allclose(result.centroids, torch.stack([points[:3].mean(0), points[3:].mean(0)]), atol=1e-6)
    meant = sum(float((part - part.mean(0)).square().sum()) for part in points.split(3))
    assert result.inertia == pytest.approx(meant, rel=1e-5)


def test_directions_are_those_of_faiss_from_the_same_start() -> None:
    import faiss

    points = unit(blobs(900, 5, 6))
    peer = faiss.Kmeans(6, 8, niter=25, spherical=True, min_points_per_centroid=1, max_points_per_centroid=10**6)
    peer.train(points.numpy(), init_centroids=points[:8].numpy())
    theirs = Codebook(torch.from_numpy(peer.centroids), COSINE_UNIT)
    inertia = float(squared_errors(points, theirs, nearest(points, theirs)).sum())
    assert run(points, 8, metric=COSINE_UNIT, init=points[:8]).inertia <= inertia * 1.02


@pytest.mark.parametrize("metric", [COSINE, COSINE_UNIT])
def test_by_cosine_the_inertia_is_that_of_the_centroids_and_falls_and_no_cluster_is_empty(metric: Metric) -> None:
    points = blobs(1100, 9, 5) * normal(1100, 1, seed=1).abs()
    ends = []
    for iterations in (1, 3, 300):
        result = run(points, 9, metric=metric, init=points[:9], iterations=iterations)
        codebook = Codebook(result.centroids, metric)
        inertia = float(squared_errors(points, codebook, nearest(points, codebook)).sum())
        assert result.inertia >= inertia * (1 - 1e-5)  # of the means of the last cells; the nearest may be nearer
        ends.append(result.inertia)
    assert result.inertia == pytest.approx(inertia, rel=1e-3)
    assert ends[0] >= ends[1] >= ends[2]
    points = blobs(400, 4, 3)
    assert used(points, run(points, 12, metric=metric, init=points[:1].expand(12, -1).clone()), metric) == 12
    with pytest.raises(CodebookError, match="k=3 asks for more codes than the 2 distinct latents"):
        run(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), 3, metric=metric)


def test_directions_that_cancel_out_keep_their_centroid_finite() -> None:
    points = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    result = run(points, 1, metric=COSINE_UNIT, init=torch.tensor([[0.0, -1.0]]))
    assert torch.isfinite(result.centroids).all() and float(result.centroids.norm()) == pytest.approx(1)


# --- split-and-merge moves out of a local optimum ------------------------------------------------------------------


def moves(codebook: Codebook, points: Tensor, count: int) -> Moves:
    near = Neighbors.of(codebook, 32).codes
    return split_and_merge(codebook, points, nearest(points, codebook), near, count, torch.Generator().manual_seed(0))


def moved(codes: Tensor, points: Tensor, count: int) -> Tensor:
    return moves(Codebook(codes), points, count).vectors


def islands(count: int, each: int) -> tuple[Tensor, Tensor]:
    """Points around means that lie far apart, in random order, and those means."""
    means = 20 * normal(count, 16, seed=1)
    points = means.repeat_interleave(each, 0) + normal(count * each, 16, seed=2)
    return points[torch.randperm(len(points), generator=torch.Generator().manual_seed(3))], means


def test_by_hand_the_code_that_is_cheapest_to_merge_goes_into_the_cell_of_the_largest_error() -> None:
    points, codes = column(0, 1, 10, 20, 40), column(0, 1, 15, 40)
    # Merging 0 and 1 costs 1/2; the cell of 15 has an error of 50, that of 40 none.
    result = moved(codes, points, 1)
    assert torch.equal(result[[1, 3]], codes[[1, 3]])
    assert sorted(result[[0, 2], 0].tolist()) == pytest.approx([13.5, 16.5])  # 0.3 of the way to 10, and beyond
    assert moves(Codebook(codes), points, 1).into.tolist() == [1, 1, 2, 3]


def test_points_follow_a_merge_through_cells_that_are_moved_themselves() -> None:
    """0 of one point goes into 1, then 2 of one point into 0: the points of 2 are near 1."""
    points = column(0, 1, 1, 1, 1, 1, 1, 1, 1, -1.5, 50, 60, 70, 90, 100, 110)
    codes = column(0, 1, -1.5, 60, 100)
    into = moves(Codebook(codes), points, 2).into
    assert into.tolist() == [1, 1, 1, 3, 4]


def test_a_dead_code_goes_first_and_no_partner_of_a_merge_goes_too() -> None:
    codes = column(0, 0.5, 15, 44, 500)
    result = moved(codes, column(0, 0.5, 10, 20, 40, 48), 2)
    # 500 and 0 go into the cells of 15 and 44; 0.5 is what 0 would be merged into.
    assert [code for code in range(5) if result[code] == codes[code]] == [1]
    assert {int(result[code]) // 10 for code in (0, 2, 3, 4)} == {1, 4}


def test_without_error_nothing_moves_and_unit_rows_stay_unit() -> None:
    points, means = islands(8, 20)
    assert torch.equal(moved(means, means, 3), means)
    codebook = Codebook(unit(points[:8]), COSINE_UNIT)
    rows = moves(codebook, points, 8).vectors  # more than can be moved
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(8))


def test_kmeans_finds_every_island_where_seeds_and_lloyd_alone_miss_some() -> None:
    points, means = islands(200, 40)
    for seed, scale in enumerate((1.0, 1e-4)):
        centroids = kmeans(scale * points, 200, init="random", seed=seed, watch=Watch()).centroids
        assert len(nearest(scale * means, Codebook(centroids)).unique()) == 200
    alone = KMeans(200, init="random", n_init=1, random_state=0).fit(points.numpy()).cluster_centers_
    assert len(nearest(means, Codebook(torch.from_numpy(alone))).unique()) < 190


def test_given_seeds_get_no_moves() -> None:
    points, means = islands(32, 30)
    start = torch.cat([means[:30], means[:2] + 0.1])  # two islands without a code, two with two
    centroids = kmeans(points, 32, init=start, watch=Watch()).centroids
    assert len(nearest(means, Codebook(centroids)).unique()) < 32
