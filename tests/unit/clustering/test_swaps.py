"""Split-and-merge moves out of a local optimum."""

from __future__ import annotations

import pytest
import torch
from points import column, normal
from torch import Tensor

from codebook_tools.clustering.assignment import nearest
from codebook_tools.clustering.kmeans import kmeans
from codebook_tools.clustering.metric import COSINE_UNIT, unit
from codebook_tools.clustering.split_merge import split_and_merge
from codebook_tools.codebook import Codebook
from codebook_tools.runtime.progress import Watch


def moved(codes: Tensor, points: Tensor, count: int) -> Tensor:
    return split_and_merge(Codebook(codes), points, count, torch.Generator().manual_seed(0))


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
    rows = split_and_merge(codebook, points, 8, torch.Generator().manual_seed(0))  # more than can be moved
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(8))


def test_kmeans_finds_every_island_where_seeds_and_lloyd_alone_miss_some() -> None:
    from sklearn.cluster import KMeans

    points, means = islands(200, 40)
    for seed in range(2):
        centroids = kmeans(points, 200, init="random", seed=seed, watch=Watch()).centroids
        assert len(nearest(means, Codebook(centroids)).unique()) == 200
    alone = KMeans(200, init="random", n_init=1, random_state=0).fit(points.numpy()).cluster_centers_
    assert len(nearest(means, Codebook(torch.from_numpy(alone))).unique()) < 190


def test_given_seeds_get_no_moves() -> None:
    points, means = islands(32, 30)
    start = torch.cat([means[:30], means[:2] + 0.1])  # two islands without a code, two with two
    centroids = kmeans(points, 32, init=start, watch=Watch()).centroids
    assert len(nearest(means, Codebook(centroids)).unique()) < 32
