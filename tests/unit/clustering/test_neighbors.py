"""Searches among the neighbors of codes: the lists, the certificate, and k-means by them against one by all codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from points import column, normal
from processes import together
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from codebook_tools.clustering import passes
from codebook_tools.clustering.assignment import nearest, squared_errors
from codebook_tools.clustering.kmeans import kmeans
from codebook_tools.clustering.metric import COSINE_UNIT, unit
from codebook_tools.clustering.neighbors import Neighbors
from codebook_tools.clustering.passes import InMemory
from codebook_tools.clustering.seeding import draw_by_error, seeds
from codebook_tools.codebook import Codebook
from codebook_tools.runtime.progress import Watch


def around(centers: int, dim: int, each: int, seed: int = 0, spread: float = 0.3) -> Tensor:
    means = normal(centers, dim, seed=seed)
    points = means.repeat_interleave(each, 0) + spread * normal(centers * each, dim, seed=seed + 1)
    return points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize(("size", "count"), [(40, 7), (40, 40), (3000, 5), (3001, 16), (4096, 32)])
def test_lists_are_those_of_scikit_learn(size: int, count: int) -> None:
    codes = normal(size, 6, seed=size)
    neighbors = Neighbors.of(Codebook(codes), count)
    distances, expected = NearestNeighbors(n_neighbors=count).fit(codes.numpy()).kneighbors(codes.numpy())
    assert (neighbors.codes.numpy() == expected).mean() > 0.999  # two may be as near as float32 tells
    if count < size:
        torch.testing.assert_close(neighbors.reach.double(), torch.from_numpy(distances[:, -1]), rtol=1e-3, atol=1e-3)
    else:
        assert neighbors.reach.isinf().all()


def test_by_hand_a_point_goes_to_the_nearest_of_the_codes_near_its_own() -> None:
    codebook = Codebook(column(0, 1, 2, 10, 11))
    neighbors = Neighbors.of(codebook, 2)
    assert neighbors.codes.tolist() == [[0, 1], [1, 0], [2, 1], [3, 4], [4, 3]]
    assert neighbors.reach.tolist() == [1, 1, 1, 1, 1]
    codes, certain = neighbors.search(column(0.1, 0.9, 10.6, 10.4), codebook, torch.tensor([0, 0, 3, 0]))
    assert codes.tolist() == [0, 1, 4, 1]
    # 0.1 is 0.1 away from 0, twice: less than 1. 0.9 is 0.9 and 0.1 away, 10.6 is 0.6 and 0.4 away: not less.
    assert certain.tolist() == [True, False, False, False]


def test_products_that_round_coarsely_make_nothing_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codebook_tools.clustering.neighbors.rounding", lambda: 2.0**-7)
    codebook = Codebook(column(0, 1, 2, 10, 11))
    codes, certain = Neighbors.of(codebook, 2).search(column(0.1), codebook, torch.tensor([0]))
    assert codes.tolist() == [0] and certain.tolist() == [False]


@examples(max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 90), st.sampled_from([1, 2, 5, 24]), st.sampled_from([2, 8, 32]))
def test_no_code_is_nearer_where_the_search_says_so(seed: int, size: int, dim: int, count: int) -> None:
    """Codes and points with repeats, and near codes that are far off."""
    random = np.random.default_rng(seed)
    codes = torch.from_numpy(random.integers(-3, 4, (size, dim)).astype(np.float32) * 10.0 ** random.integers(-3, 4))
    codes = (codes + 0.1 * codes.std(correction=0) * normal(size, dim, seed=seed)).float()
    points = codes[random.integers(size, size=200)] + 0.3 * codes.std(correction=0) * normal(200, dim, seed=seed + 1)
    codebook = Codebook(codes)
    near = torch.from_numpy(random.integers(size, size=200))
    of_all_codes = nearest(points, codebook)
    near = torch.where(torch.from_numpy(random.random(200) < 0.7), of_all_codes, near)
    codes_by_lists, certain = Neighbors.of(codebook, count).search(points, codebook, near)
    by_lists, of_all = (squared_errors(points, codebook, of) for of in (codes_by_lists, of_all_codes))
    scale = float(of_all.max() + codes.double().square().sum(1).max())
    assert bool((by_lists[certain] <= of_all[certain] + 1e-5 * scale).all())
    of_near = squared_errors(points, codebook, near)
    assert bool((by_lists <= of_near + 1e-5 * scale).all())  # it stays, or gets nearer
    if count >= size:
        assert bool(certain.all())


def test_passes_among_neighbors_have_the_sums_of_their_cells() -> None:
    """After several passes, moves and places, sums kept up to date are those counted anew."""
    points, weights = around(400, 4, 20), torch.rand(8000, dtype=torch.float64) + 0.1
    for of in (None, weights):
        near = InMemory(points, of, 8192)  # as with so many codes
        assert near.is_local
        vectors = points[:300].clone()
        for step in range(6):
            codebook = Codebook(vectors)
            cells = near.cells(codebook, None, everywhere=step == 4)
            codes = near.codes
            assert codes is not None
            if step == 4:
                of_all = squared_errors(points, codebook, nearest(points, codebook))
                torch.testing.assert_close(squared_errors(points, codebook, codes), of_all, rtol=1e-5, atol=1e-6)
            one_hot = torch.nn.functional.one_hot(codes, 300).double() * (1 if of is None else of[:, None])
            torch.testing.assert_close(cells.sums, one_hot.T @ points.double(), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(cells.hits, one_hot.sum(0), rtol=1e-12, atol=1e-12)
            vectors = cells.means(codebook)
            if step == 1:
                vectors[7], vectors[9] = points[5000], points[6000]
                near.place(torch.tensor([5000, 6000]), torch.tensor([7, 9]))
            if step == 2:
                near = near.moved(torch.arange(300).flip(0))


@pytest.mark.parametrize("metric", ["euclidean", "unit"])
def test_many_codes_end_as_low_as_by_searches_among_all(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for points in (
        around(150, 24, 120),
        normal(12_000, 20),
        torch.cat([around(90, 20, 100), normal(900, 20)[:3].repeat(300, 1)]),
    ):
        rows = points if metric == "euclidean" else unit(points)
        settings = {} if metric == "euclidean" else {"metric": COSINE_UNIT}
        near = kmeans(rows, 400, watch=Watch(), **settings)
        with monkeypatch.context() as patch:
            patch.setattr("codebook_tools.clustering.passes._NEARBY_FROM", 10**9)
            of_all = kmeans(rows, 400, watch=Watch(), **settings)
        assert near.inertia <= 1.01 * of_all.inertia
        codebook = Codebook(near.centroids, COSINE_UNIT) if settings else Codebook(near.centroids)
        true = float(squared_errors(rows, codebook, nearest(rows, codebook)).sum())
        assert 0.995 * near.inertia <= true <= near.inertia * (1 + 1e-5)


def test_seeds_drawn_in_batches_are_as_good_as_those_drawn_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against scikit-learn's, without its trials: the mean error of 12 draws, within three of its standard errors."""
    monkeypatch.setattr("codebook_tools.clustering.seeding._GREEDY", 1)
    from sklearn.cluster import kmeans_plusplus

    points = around(300, 5, 20)

    def error(centers: Tensor) -> float:
        codebook = Codebook(centers)
        return float(squared_errors(points, codebook, nearest(points, codebook)).mean())

    ours = [error(seeds(points, 400, "kmeans++", seed)) for seed in range(12)]
    one_by_one = [
        error(torch.from_numpy(kmeans_plusplus(points.numpy(), 400, random_state=seed, n_local_trials=1)[0]))
        for seed in range(12)
    ]
    noise = (np.var(ours) / 12 + np.var(one_by_one) / 12) ** 0.5
    assert abs(np.mean(ours) - np.mean(one_by_one)) < 3 * noise


def test_an_empty_cell_gets_a_point_that_finds_it() -> None:
    """400 codes of which 80 are far from everything: all are used in the end, though lists were made before."""
    points = around(500, 8, 20)
    start = torch.cat([points[:320], 100 + normal(80, 8)])
    result = kmeans(points, 400, init=start, watch=Watch())
    assert len(nearest(points, Codebook(result.centroids)).unique()) == 400


def test_empty_cells_get_points_from_behind_a_head_of_repeats() -> None:
    points = torch.cat([normal(3, 8).repeat(1700, 1), around(200, 8, 10)])
    start = torch.cat([points[-100:], 100 + normal(200, 8)])
    result = kmeans(points, 300, init=start, watch=Watch())
    assert len(nearest(points, Codebook(result.centroids)).unique()) == 300


def test_draws_with_known_codes_are_those_without() -> None:
    points, codebook = around(60, 3, 10), Codebook(around(60, 3, 10)[:9])
    known = draw_by_error(points, codebook, 20, 1, codes=nearest(points, codebook))
    assert torch.equal(known, draw_by_error(points, codebook, 20, 1))


def ends(nearby_from: str) -> list[list[float]]:
    """Centroids by the seeds of the package, and by some that leave ten cells empty."""
    passes._FUSED_FROM = int(nearby_from)
    points = around(200, 6, 40)
    start = torch.cat([points[:290], 100 + normal(10, 6)])
    results = [kmeans(points, 300, watch=Watch()), kmeans(points, 300, init=start, watch=Watch())]
    return [result.centroids.flatten().tolist() for result in results]


@pytest.mark.slow
@pytest.mark.parametrize("nearby_from", ["256", "8192"])
def test_two_processes_end_where_one_does(nearby_from: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_FUSED_FROM", 0)  # so that it is set back
    alone = ends(nearby_from)
    for both in together(ends, nearby_from):
        for ours, theirs in zip(both, alone, strict=True):
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-4)
