"""The controls: the most used codes as they are, latents drawn alike, and seeds without Lloyd; and kmeans.seeds."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from points import column, normal
from sklearn.cluster import kmeans_plusplus
from torch import Tensor

from codebook_tools.clustering.seeding import Init, seeds
from codebook_tools.codebook import REMOVED, Codebook
from codebook_tools.data.latents import StoredLatents
from codebook_tools.strategies import KmeansSeeds, Prune, RandomLatents, TopK

each_init = pytest.mark.parametrize("init", ["kmeans++", "afkmc2", "random"])
each_control = pytest.mark.parametrize(("init", "control"), [("random", RandomLatents), ("kmeans++", KmeansSeeds)])
OLD, COUNTS = Codebook(torch.arange(5.0)[:, None] + torch.tensor([0.0, 0.5])), torch.tensor([4, 0, 1, 0, 9])


@pytest.mark.parametrize("k", [1, 3, 4, 5])
def test_top_k_is_pruning_down_to_k(k: int) -> None:
    top, pruned = (strategy(OLD, StoredLatents(torch.empty(0, 2)), COUNTS) for strategy in (TopK(k), Prune(keep=k)))
    assert torch.equal(top.codebook.vectors, pruned.codebook.vectors)
    assert torch.equal(top.index_map, pruned.index_map)


@each_control
def test_codes_are_the_distinct_seeds_of_kmeans_whatever_the_old_ones_were(init: Init, control: Any) -> None:
    points = normal(200, 2)
    for k, seed in ((1, 0), (20, 5), (200, 0), (9, -1), (9, 2**63)):
        surgery = control(k, seed=seed)(OLD, StoredLatents(points, 30), COUNTS)
        rows = {*map(tuple, surgery.codebook.vectors.tolist())}
        assert torch.equal(surgery.codebook.vectors, seeds(points, k, init, seed))
        assert len(rows) == k and rows <= {*map(tuple, points.tolist())} and surgery.index_map.tolist() == [REMOVED] * 5
        other = control(k, seed=seed)(Codebook(OLD.vectors[:2] + 9), StoredLatents(points), torch.tensor([0, 0]))
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


# --- the seeds of k-means ------------------------------------------------------------------------------------------


@each_init
def test_seeds_come_from_the_first_head_unless_repeats_crowd_it(init: Init) -> None:
    """It has 4,096 points, or eight a seed where those are more."""
    points = column(*range(9000))
    drawn = torch.cat([seeds(points, 2, init, seed) for seed in range(60)])
    assert 2000 < drawn.max() < 4096
    assert 5000 < seeds(points, 800, init, 0).max() < 6400
    crowded = torch.cat([torch.zeros(5000, 1), torch.arange(1.0, 3000)[:, None]])
    assert torch.cat([seeds(crowded, 2, init, seed) for seed in range(10)]).max() > 1500


@pytest.mark.parametrize("init", ["kmeans++", "afkmc2"])
def test_careful_seeds_never_stand_at_one_place_twice(init: Init) -> None:
    for seed in range(60):
        points = torch.randint(-3, 4, (30, 1), generator=torch.Generator().manual_seed(seed)).float()
        distinct = len(points.unique())
        for k in (1, 1 + seed % distinct, distinct):
            assert len(seeds(points, k, init, seed).unique()) == k


@each_init
def test_seeds_differ_between_seeds_and_are_no_view_of_the_points(init: Init) -> None:
    points = normal(300, 3)
    before = points.clone()
    ones = [seeds(points, 8, init, seed) for seed in (0, 0, 1, -1)]
    ones[1].fill_(7)
    assert torch.equal(points, before) and torch.equal(ones[0], seeds(points, 8, init, 0))
    assert all(not torch.equal(ones[0], other) for other in ones[2:])
