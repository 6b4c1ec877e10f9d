"""Swaps: codes that are hardly needed go where one stands for many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from codebook_tools.clustering.assignment import nearest
from codebook_tools.clustering.kmeans import kmeans
from codebook_tools.clustering.metric import COSINE_UNIT
from codebook_tools.clustering.split_merge import swapped
from codebook_tools.codebook import Codebook
from codebook_tools.runtime.progress import Watch


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def islands(count: int, each: int, dim: int = 16) -> tuple[Tensor, Tensor]:
    """Points around means that lie far apart, in random order, and those means."""
    means = 20 * torch.randn(count, dim, generator=random(1))
    points = means.repeat_interleave(each, 0) + torch.randn(count * each, dim, generator=random(2))
    return points[torch.randperm(len(points), generator=random(3))], means


def test_by_hand_the_code_that_merging_costs_least_goes_into_the_cell_of_the_largest_error() -> None:
    points = torch.tensor([[0.0], [1.0], [10.0], [20.0], [40.0]])
    # Merging 0 and 1 costs 1/2; the cell of 15 has an error of 50, that of 40 none.
    codebook = Codebook(torch.tensor([[0.0], [1.0], [15.0], [40.0]]))
    moved = swapped(codebook, points, 1, random())
    assert torch.equal(moved[[1, 3]], codebook.vectors[[1, 3]])
    assert sorted(moved[[0, 2], 0].tolist()) == pytest.approx([13.5, 16.5])  # 0.3 of the way to 10, and beyond
    assert set(nearest(points, Codebook(moved)).tolist()) == {0, 1, 2, 3}


def test_a_dead_code_goes_first_and_no_partner_of_a_merge_goes_too() -> None:
    points = torch.tensor([[0.0], [0.5], [10.0], [20.0], [40.0], [48.0]])
    codebook = Codebook(torch.tensor([[0.0], [0.5], [15.0], [44.0], [500.0]]))
    moved = swapped(codebook, points, 2, random())
    kept = [code for code in range(5) if torch.equal(moved[code], codebook.vectors[code])]
    assert kept == [1]  # 500 and 0 went, into the cells of 15 and 44; 1 is what 0 would be merged into
    assert {int(moved[code]) // 10 for code in (0, 2, 3, 4)} == {1, 4}


def test_more_than_can_be_moved_moves_what_can_and_without_error_nothing_does() -> None:
    points, means = islands(6, 30)
    codes = Codebook(points[:6].clone())
    assert swapped(codes, points, 6, random()).shape == codes.vectors.shape
    alone = Codebook(means)
    assert torch.equal(swapped(alone, means, 3, random()), means)  # every point is its code


def test_unit_rows_stay_unit() -> None:
    points, _ = islands(8, 20)
    codebook = Codebook(torch.nn.functional.normalize(points[:8]), COSINE_UNIT)
    lengths = swapped(codebook, points, 4, random()).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(8))


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_finds_every_island_where_seeds_and_lloyd_alone_miss_some(seed: int) -> None:
    from sklearn.cluster import KMeans

    points, means = islands(200, 40)
    centroids = kmeans(points, 200, init="random", seed=seed, watch=Watch()).centroids
    assert len(set(nearest(means, Codebook(centroids)).tolist())) == 200
    alone = KMeans(200, init="random", n_init=1, random_state=seed).fit(points.numpy()).cluster_centers_
    assert len(set(nearest(means, Codebook(torch.from_numpy(alone))).tolist())) < 190


def test_seeds_that_were_given_are_not_swapped() -> None:
    points, means = islands(32, 30)
    start = torch.cat([means[:30], means[:2] + 0.1])  # two islands without a code, two with two
    given = kmeans(points, 32, init=start, watch=Watch())
    assert len(set(nearest(means, Codebook(given.centroids)).tolist())) < 32
    assert kmeans(points, 32, watch=Watch()).inertia < 0.5 * given.inertia
