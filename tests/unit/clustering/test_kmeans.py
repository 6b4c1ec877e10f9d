"""k-means: against scikit-learn from the same start, by hand, and where points repeat, crowd or run out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch import Tensor

from codebook_tools.clustering.assignment import nearest, squared_errors
from codebook_tools.clustering.kmeans import Clustering, kmeans
from codebook_tools.clustering.metric import COSINE, COSINE_UNIT, unit
from codebook_tools.clustering.seeding import Init, afkmc2, count_distinct
from codebook_tools.codebook import Codebook, Metric
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.progress import Watch

INITS: tuple[Init, ...] = ("kmeans++", "afkmc2", "random")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blobs(count: int, clusters: int, dim: int, seed: int = 0) -> Tensor:
    """Points around well-parted centres, in random order."""
    generator = torch.Generator().manual_seed(seed)
    centres = 20 * torch.randn(clusters, dim, generator=generator)
    labels = torch.randint(clusters, (count,), generator=generator)
    return centres[labels] + torch.randn(count, dim, generator=generator)


def inertia_of(points: Tensor, centroids: Tensor) -> float:
    """Sum of squared distances to the nearest centroid, in float64, by brute force."""
    return float(torch.cdist(points.double(), centroids.double()).amin(1).square().sum())


def run(
    points: Tensor, k: int, *, init: Init | Tensor = "kmeans++", iterations: int = 300, seed: int = 0
) -> Clustering:
    """To a tolerance that leaves no more than a ten-thousandth to gain."""
    return kmeans(points, k, init=init, iterations=iterations, tolerance=1e-5, seed=seed, watch=Watch())


# --- against others and by hand ------------------------------------------------------------------------------------


def test_four_points_and_two_seeds_by_hand() -> None:
    points = torch.tensor([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [10.0, 2.0]])
    found = run(points, 2, init=torch.tensor([[1.0, 1.0], [9.0, 1.0]]))
    assert found.centroids.tolist() == [[0.0, 1.0], [10.0, 1.0]]
    assert found.inertia == pytest.approx(4.0)
    assert found.converged


def test_lloyd_stays_in_the_optimum_that_its_seeds_lead_to() -> None:
    """The same rectangle cut the other way is a fixed point too, twenty-five times worse: no restart hides that."""
    points = torch.tensor([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [10.0, 2.0]])
    found = run(points, 2, init=torch.tensor([[5.0, 0.0], [5.0, 2.0]]))
    assert found.centroids.tolist() == [[5.0, 0.0], [5.0, 2.0]]
    assert found.inertia == pytest.approx(100.0)


def test_one_cluster_is_the_mean() -> None:
    points = normal(500, 7)
    found = run(points, 1)
    assert torch.allclose(found.centroids[0].double(), points.double().mean(0), atol=1e-6)
    assert found.inertia == pytest.approx(float((points.double() - points.double().mean(0)).square().sum()), rel=1e-5)


@pytest.mark.parametrize(("count", "k", "dim"), [(400, 3, 2), (1000, 10, 8), (2000, 7, 1), (1500, 20, 16)])
def test_the_same_start_ends_as_low_as_scikit_learn_or_lower(count: int, k: int, dim: int) -> None:
    """Few enough points that there is one head: then it is Lloyd from the given seeds, nothing else."""
    points = normal(count, dim, seed=k)
    reference = KMeans(k, init=points[:k].numpy(), n_init=1, max_iter=300, tol=0, algorithm="lloyd").fit(points.numpy())
    found = run(points, k, init=points[:k])
    assert found.centroids.dtype == torch.float32 and found.centroids.shape == (k, dim)
    # Momentum may carry it past a shallow optimum; it stops a little before scikit-learn's tol=0.
    assert reference.inertia_ * 0.98 <= found.inertia <= reference.inertia_ * 1.001
    assert found.inertia == pytest.approx(inertia_of(points, found.centroids), rel=1e-5)


def test_one_iteration_gives_scikit_learns_centroids() -> None:
    points = normal(600, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = KMeans(9, init=points[:9].numpy(), n_init=1, max_iter=1, tol=0, algorithm="lloyd")
        reference = model.fit(points.numpy())
    found = run(points, 9, init=points[:9], iterations=1)
    assert torch.allclose(found.centroids, torch.from_numpy(reference.cluster_centers_), atol=1e-5)
    assert found.iterations == 1 and not found.converged


def test_momentum_needs_a_fraction_of_the_iterations() -> None:
    """Many cells in a smooth cloud: where Lloyd alone creeps."""
    points, k = normal(8000, 8), 100
    alone = KMeans(k, init=points[:k].numpy(), n_init=1, max_iter=60, tol=0, algorithm="lloyd").fit(points.numpy())
    assert run(points, k, init=points[:k], iterations=30).inertia < alone.inertia_


@pytest.mark.parametrize("init", INITS)
def test_growing_heads_end_as_low_as_scikit_learn_on_all_points_at_once(init: Init) -> None:
    points = normal(6000, 4)  # heads of 375, 1,500 and 6,000
    k = 5
    reference = min(KMeans(k, n_init=1, tol=0, random_state=s).fit(points.numpy()).inertia_ for s in range(5))
    found = run(points, k, init=init)
    assert found.inertia <= 1.01 * reference
    assert found.inertia == pytest.approx(inertia_of(points, found.centroids), rel=1e-5)


@pytest.mark.parametrize("init", INITS)
def test_parted_blobs_are_found_with_the_right_sizes(init: Init) -> None:
    points = blobs(3000, 4, 3)
    found = min((run(points, 4, init=init, seed=seed) for seed in range(5)), key=lambda c: c.inertia)
    assert found.inertia / 3000 == pytest.approx(3, rel=0.1)  # the variance of a unit normal in 3 dimensions
    assert found.converged


def test_each_centroid_is_the_mean_of_its_cell_once_converged() -> None:
    points = blobs(800, 6, 3)
    found = run(points, 6)
    cells = nearest(points, Codebook(found.centroids))
    for code in range(6):
        assert torch.allclose(found.centroids[code], points[cells == code].mean(0), atol=1e-3)


# --- seeding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
def test_the_seeds_of_one_iteration_differ_between_inits_and_seeds(init: Init) -> None:
    points = normal(300, 4)
    ones = {other: run(points, 8, init=other, iterations=1).centroids for other in INITS}
    assert all(not torch.equal(ones[init], ones[other]) for other in INITS if other != init)
    assert not torch.equal(ones[init], run(points, 8, init=init, iterations=1, seed=1).centroids)


def test_afkmc2_seeds_are_points_and_as_good_as_kmeans_plus_plus() -> None:
    """Twelve far blobs: uniform seeds miss several, both careful seedings hardly any; means over thirty draws."""
    points = blobs(2000, 12, 4, seed=3).numpy()

    def mean(draw: Iterator[np.ndarray]) -> float:
        return float(np.mean([inertia_of(torch.from_numpy(points), torch.from_numpy(s)) for s in draw]))

    chains = [afkmc2(points, 12, np.random.default_rng(s)) for s in range(30)]
    rows = {row.tobytes() for row in points}
    assert all(seed.tobytes() in rows for seed in chains[0]) and len(np.unique(chains[0], axis=0)) == 12
    careful = mean(kmeans_plusplus(points, 12, random_state=s, n_local_trials=1)[0] for s in range(30))
    uniform = mean(points[np.random.default_rng(s).choice(2000, 12, replace=False)] for s in range(30))
    assert mean(iter(chains)) < 2 * careful
    assert 4 * mean(iter(chains)) < uniform


def test_afkmc2_draws_its_second_seed_in_proportion_to_squared_distance() -> None:
    """A long chain forgets its proposal. From the first seed 0 the point 1 has weight 1, the point 3 has weight 9."""
    points = np.array([[0.0], [1.0], [3.0]], dtype=np.float32)
    second = {0.0: [], 1.0: [], 3.0: []}  # type: dict[float, list[float]]
    for seed in range(1200):
        first, other = afkmc2(points, 2, np.random.default_rng(seed), chain=50)[:, 0].tolist()
        second[first].append(other)
    for first, expected in ((0.0, 9 / 10), (1.0, 4 / 5), (3.0, 4 / 13)):  # of the farther, or of 1.0 from 3.0
        drawn = second[first]
        share = np.mean([x == (3.0 if first < 3 else 1.0) for x in drawn])
        assert len(drawn) > 300 and first not in drawn
        assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / len(drawn)) ** 0.5)


@pytest.mark.parametrize("chain", [1, 2, 200])
def test_afkmc2_takes_points_that_are_all_alike(chain: int) -> None:
    points = np.full((40, 3), 7, dtype=np.float32)
    assert np.array_equal(afkmc2(points, 4, np.random.default_rng(0), chain), points[:4])


# --- repeats, crowds and limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("copies", [1, 3, 40])
def test_as_many_codes_as_distinct_points_leave_no_error(init: Init, copies: int) -> None:
    distinct = normal(12, 3)
    points = distinct.repeat(copies, 1)[torch.randperm(12 * copies, generator=torch.Generator().manual_seed(0))]
    found = run(points, 12, init=init)
    assert found.inertia == pytest.approx(0, abs=1e-8)
    assert torch.allclose(found.centroids[nearest(points, Codebook(found.centroids))], points, atol=1e-6)
    assert len(nearest(points, Codebook(found.centroids)).unique()) == 12


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("copies", [1, 2, 5])
def test_rare_points_behind_a_crowded_head_get_codes_of_their_own(init: Init, copies: int) -> None:
    """The heads that seeds and first iterations see hold one point, thousands of times."""
    rare = torch.arange(1.0, 20).repeat(copies)[:, None].repeat(1, 2) + 100
    points = torch.cat([torch.zeros(6000, 2), rare])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # scikit-learn's about the head are not the user's business
        found = run(points, 20, init=init)
    assert found.inertia == pytest.approx(0, abs=1e-3)
    assert len(nearest(points, Codebook(found.centroids)).unique()) == 20


@pytest.mark.parametrize("init", ["kmeans++", "afkmc2"])
def test_seeds_are_drawn_from_all_points_where_repeats_crowd_the_first_head(init: Init) -> None:
    """Ten blobs at growing distances behind thousands of zeros: without seeds of their own, the far ones take all."""
    generator = torch.Generator().manual_seed(0)
    blobs_ = [10.0 * i + torch.randn(30, 2, generator=generator) for i in range(1, 11)]
    points = torch.cat([torch.zeros(12_000, 2), *blobs_])
    found = min((run(points, 11, init=init, seed=seed) for seed in range(5)), key=lambda c: c.inertia)
    assert found.inertia < 2 * 300 * 2  # the blobs' own variance is 1 in each of 2 dimensions


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dim", [1, 3, 8, 17])
def test_codes_are_not_wasted_on_copies_that_rounding_tells_apart(init: Init, dim: int) -> None:
    """Products of matrices may round equal rows differently: two centroids at one place then both keep their points."""
    numbers = np.random.default_rng(dim)
    for seed in range(12):
        distinct = torch.from_numpy(numbers.normal(size=(24, dim)).astype(np.float32))
        points = distinct[torch.from_numpy((numbers.random(1500) ** 3 * 24).astype(np.int64))]
        k = len(points.unique(dim=0)) - 1
        found = run(points, k, init=init, seed=seed)
        assert len(nearest(points, Codebook(found.centroids)).unique()) == k


@pytest.mark.parametrize(("count", "repeats"), [(5, 1), (5, 30), (1, 1), (1, 9), (40, 60)])
def test_more_codes_than_distinct_points_is_the_users_error_with_the_way_out(count: int, repeats: int) -> None:
    points = normal(count, 2).repeat(repeats, 1)
    with pytest.raises(CodebookError) as caught:
        run(points, count + 1)
    message = str(caught.value)
    assert message.startswith(f"k={count + 1} asks for more codes than the {count} distinct latents")
    assert f"--k {count} or less" in message and "more data" in message and "\n" not in message
    assert len(run(points, count).centroids) == count


def test_empty_clusters_spread_over_distinct_points_where_repeats_have_the_largest_errors() -> None:
    """scikit-learn alone moves both empty clusters to 50.0, which stands there ten times, and stops with one empty."""
    points = torch.tensor([[0.0]] * 20 + [[1.0]] * 20 + [[50.0]] * 10 + [[9.0]])
    found = run(points, 4, init=torch.tensor([[0.0], [-900.0], [-901.0], [-902.0]]))
    assert sorted(found.centroids.flatten().tolist()) == pytest.approx([0.0, 1.0, 9.0, 50.0], abs=1e-4)
    assert found.inertia == pytest.approx(0, abs=1e-6)


def test_the_inertia_is_no_less_than_that_of_the_codes_given_back_even_when_clusters_moved_last() -> None:
    points = torch.tensor([[0.0]] * 20 + [[1.0]] * 20 + [[50.0]] * 10)
    found = run(points, 3, init=torch.tensor([[0.0], [-900.0], [-901.0]]), iterations=1)
    assert found.iterations == 1 and not found.converged
    assert found.inertia >= inertia_of(points, found.centroids)


def test_an_empty_cluster_moves_to_the_point_with_the_largest_error() -> None:
    points = torch.tensor([[0.0], [1.0], [2.0], [50.0]])
    found = run(points, 2, init=torch.tensor([[1.0], [-900.0]]))
    assert sorted(found.centroids.flatten().tolist()) == pytest.approx([1.0, 50.0])
    assert found.inertia == pytest.approx(2.0, abs=1e-4)


@pytest.mark.parametrize("init", INITS)
def test_no_code_stays_without_points_even_where_codes_are_many(init: Init) -> None:
    points = normal(90, 2)
    for k in (30, 60, 89, 90):
        found = run(points, k, init=init)
        assert len(nearest(points, Codebook(found.centroids)).unique()) == k


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_a_large_common_offset_costs_nothing(init: Init, offset: float) -> None:
    points = normal(2000, 4) + offset
    found, reference = run(points, 10, init=init), run((points.double() - offset).float(), 10, init=init)
    assert inertia_of(points, found.centroids) == pytest.approx(reference.inertia, rel=0.03)
    assert len(nearest(points, Codebook(found.centroids)).unique()) == 10


GRID = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=40)


@given(GRID, st.data())
def test_on_any_grid_codes_are_finite_used_and_never_worse_than_their_seeds(
    rows: list[tuple[int, int]], data: st.DataObject
) -> None:
    points = torch.tensor(rows, dtype=torch.float32)
    distinct = len(set(rows))
    k = data.draw(st.integers(1, distinct))
    found = run(points, k, init=data.draw(st.sampled_from(INITS)), seed=data.draw(st.integers(0, 5)))
    assert found.centroids.shape == (k, 2) and bool(torch.isfinite(found.centroids).all())
    assert found.inertia == pytest.approx(inertia_of(points, found.centroids), rel=1e-4, abs=1e-4)
    assert found.inertia <= inertia_of(points, points.mean(0, keepdim=True)) + 1e-3
    assert len(nearest(points, Codebook(found.centroids)).unique()) == k
    low, high = points.amin(0) - 1e-4, points.amax(0) + 1e-4
    assert bool(((found.centroids >= low) & (found.centroids <= high)).all())


@given(GRID, st.integers(1, 50))
def test_distinct_points_are_counted_up_to_what_is_enough(rows: list[tuple[int, int]], enough: int) -> None:
    assert count_distinct(torch.tensor(rows, dtype=torch.float32), enough) == min(len(set(rows)), enough)


def test_minus_zero_is_no_point_of_its_own() -> None:
    assert count_distinct(torch.tensor([[0.0, 1.0], [-0.0, 1.0], [0.0, -1.0]]), 5) == 2


def test_distinct_points_far_behind_the_head_are_counted() -> None:
    points = torch.zeros(5000, 1)
    points[-9:] = torch.arange(1.0, 10)[:, None]
    assert count_distinct(points, 10) == 10
    assert count_distinct(points, 11) == 10


# --- promises ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("seed", [0, 7, -1, 2**63])
def test_the_same_seed_gives_the_same_bytes(init: Init, seed: int) -> None:
    points = normal(3000, 6)
    one, two = (run(points.clone(), 8, init=init, seed=seed) for _ in range(2))
    assert one.centroids.numpy().tobytes() == two.centroids.numpy().tobytes()
    assert (one.inertia, one.iterations, one.converged) == (two.inertia, two.iterations, two.converged)


def test_eight_threads_give_the_same_bytes_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """scikit-learn adds its threads' sums in the order in which they finish; it must not be left to more than two."""
    monkeypatch.setenv("OMP_NUM_THREADS", "8")  # or it takes no more than there are cores
    points = normal(6000, 8)
    with threadpool_limits(8, user_api="openmp"):
        found = {run(points, 24, iterations=20).centroids.numpy().tobytes() for _ in range(8)}
    assert len(found) == 1


@pytest.mark.parametrize("init", INITS)
def test_the_points_stay_as_they_are(init: Init) -> None:
    points = normal(2000, 3)
    before = points.clone()
    run(points, 6, init=init)
    assert torch.equal(points, before)


def test_given_seeds_stay_as_they_are() -> None:
    points = normal(500, 3)
    seeds = points[:5].clone()
    found = run(points, 5, init=seeds)
    assert torch.equal(seeds, points[:5])
    assert found.centroids.data_ptr() != seeds.data_ptr() and not torch.equal(found.centroids, seeds)


def test_views_of_any_stride_are_taken_as_their_values() -> None:
    wide = normal(400, 12)
    view = wide[::2, 1::3]
    assert torch.equal(run(view, 5).centroids, run(view.clone(), 5).centroids)


def test_the_most_iterations_are_kept_to_and_more_never_hurt() -> None:
    points = normal(1100, 4)  # one head
    found = [run(points, 9, init=points[:9], iterations=n) for n in (1, 2, 5, 10, 11, 25, 300)]
    assert all(c.iterations <= n for c, n in zip(found, (1, 2, 5, 10, 11, 25, 300), strict=True))
    assert all(later.inertia <= earlier.inertia * (1 + 1e-6) for earlier, later in pairwise(found))
    assert found[-1].converged and found[-1].iterations < 300


def test_the_watch_is_told_of_iterations_and_inertia() -> None:
    told: list[tuple[str, int, int | None, dict[str, float]]] = []
    watch = Watch(lambda what, done, total, figures: told.append((what, done, total, dict(figures))))
    points = normal(6000, 3)
    found = kmeans(points, 5, watch=watch)
    assert told[0][0] == "k-means on 375 latents" and told[-1][0] == "k-means on 6,000 latents"
    assert told[-1][1] == found.iterations
    assert told[-1][3]["inertia"] == pytest.approx(found.inertia / 6000, rel=1e-4)


# --- by the cosine ---------------------------------------------------------------------------------------------------

ANGLES = torch.tensor([0.0, 10.0, 20.0, 90.0, 100.0, 110.0]).deg2rad()
DIRECTIONS = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
LENGTHS = torch.tensor([1.0, 2.0, 6.0, 3.0, 1.0, 2.0])[:, None]


def by_cosine(
    points: Tensor, k: int, metric: Metric, init: Init | Tensor = "kmeans++", iterations: int = 300
) -> Clustering:
    return kmeans(points, k, init=init, iterations=iterations, metric=metric, watch=Watch())


def test_centroids_of_unit_length_are_mean_directions_whatever_the_lengths() -> None:
    found = by_cosine(LENGTHS * DIRECTIONS, 2, COSINE_UNIT, init=DIRECTIONS[[0, 5]])
    middle = torch.tensor([10.0, 100.0]).deg2rad()
    assert torch.allclose(found.centroids, torch.stack([middle.cos(), middle.sin()], 1), atol=1e-6)
    step = 2 - 2 * float(torch.tensor(10.0).deg2rad().cos())
    assert found.inertia == pytest.approx(4 * step, rel=1e-4) and found.converged


def test_raw_centroids_are_the_means_of_the_points_whose_direction_is_nearest() -> None:
    points = LENGTHS * DIRECTIONS
    found = by_cosine(points, 2, COSINE, init=points[[0, 5]])
    assert torch.allclose(found.centroids, torch.stack([points[:3].mean(0), points[3:].mean(0)]), atol=1e-6)
    meant = sum(float((part - part.mean(0)).square().sum()) for part in points.split(3))
    assert found.inertia == pytest.approx(meant, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_directions_are_those_of_faiss_from_the_same_start(seed: int) -> None:
    import faiss

    points = unit(blobs(900, 5, 6, seed))
    peer = faiss.Kmeans(6, 8, niter=25, spherical=True, min_points_per_centroid=1, max_points_per_centroid=10**6)
    peer.train(points.numpy(), init_centroids=points[:8].numpy())
    theirs = Codebook(torch.from_numpy(peer.centroids), COSINE_UNIT)
    inertia = float(squared_errors(points, theirs, nearest(points, theirs)).sum())
    assert by_cosine(points, 8, COSINE_UNIT, init=points[:8]).inertia <= inertia * 1.02


@pytest.mark.parametrize("metric", [COSINE, COSINE_UNIT])
def test_by_the_cosine_the_inertia_told_is_that_of_the_centroids_and_falls(metric: Metric) -> None:
    points = blobs(1100, 9, 5) * normal(1100, 1, seed=1).abs()
    rows = unit(points) if metric is COSINE_UNIT else points
    ends = []
    for iterations in (1, 3, 300):
        found = by_cosine(points, 9, metric, init=points[:9], iterations=iterations)
        codebook = Codebook(found.centroids, metric)
        inertia = float(squared_errors(rows, codebook, nearest(rows, codebook)).double().sum())
        assert found.inertia >= inertia * (1 - 1e-5)  # of the means of the last cells; the nearest may be nearer
        ends.append(found.inertia)
    assert found.inertia == pytest.approx(inertia, rel=1e-3)
    assert ends[0] >= ends[1] >= ends[2]


@pytest.mark.parametrize("metric", [COSINE, COSINE_UNIT])
def test_by_the_cosine_no_cluster_stays_empty_and_one_direction_is_one_code(metric: Metric) -> None:
    points = blobs(400, 4, 3)
    found = by_cosine(points, 12, metric, init=points[:1].expand(12, -1).clone())
    assert len(nearest(points, Codebook(found.centroids, metric)).unique()) == 12
    with pytest.raises(CodebookError, match="k=3 asks for more codes than the 2 distinct latents"):
        by_cosine(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), 3, metric)


def test_directions_that_cancel_out_keep_their_centroid_finite() -> None:
    points = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    found = by_cosine(points, 1, COSINE_UNIT, init=torch.tensor([[0.0, -1.0]]))
    assert torch.isfinite(found.centroids).all() and float(found.centroids.norm()) == pytest.approx(1)
