"""The controls: the most used codes as they are, latents drawn alike, and seeds without Lloyd; and kmeans.seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import kmeans_plusplus
from torch import Tensor

from codebook_tools.clustering.kmeans import Init, seeds
from codebook_tools.clustering.metric import COSINE_UNIT
from codebook_tools.codebook import REMOVED, Codebook
from codebook_tools.data.latents import StoredLatents
from codebook_tools.errors import CodebookError
from codebook_tools.strategies import KmeansSeeds, Prune, RandomLatents, TopK

INITS: tuple[Init, ...] = ("kmeans++", "afkmc2", "random")
SEEDED: dict[str, Any] = {"random": RandomLatents, "kmeans++": KmeansSeeds}
each_seeded = pytest.mark.parametrize("init", SEEDED)
each_init = pytest.mark.parametrize("init", INITS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows_of(points: Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in points]


OLD = Codebook(torch.tensor([[0.0, 0.5], [1.0, 1.5], [2.0, 2.5], [3.0, 3.5], [4.0, 4.5]]))
COUNTS = torch.tensor([4, 0, 1, 0, 9])

# --- top-k ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "kept"), [(1, [4]), (2, [0, 4]), (3, [0, 2, 4]), (4, [0, 1, 2, 4]), (5, [0, 1, 2, 3, 4])]
)
def test_the_k_most_used_stay_in_order_and_dead_ones_fill_up(k: int, kept: list[int]) -> None:
    found = TopK(k)(OLD, StoredLatents(torch.empty(0, 2)), COUNTS)
    assert torch.equal(found.codebook.vectors, OLD.vectors[kept])
    assert found.index_map.tolist() == [kept.index(code) if code in kept else REMOVED for code in range(5)]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.data())
def test_top_k_is_pruning_down_to_k(counts: list[int], data: st.DataObject) -> None:
    old, k = Codebook(normal(len(counts), 2), COSINE_UNIT), data.draw(st.integers(1, len(counts)))
    found, pruned = (
        strategy(old, StoredLatents(torch.empty(0, 2)), torch.tensor(counts)) for strategy in (TopK(k), Prune(keep=k))
    )
    assert torch.equal(found.codebook.vectors, pruned.codebook.vectors)
    assert torch.equal(found.index_map, pruned.index_map)
    assert found.codebook.metric == COSINE_UNIT


def test_more_codes_than_there_are_says_how_many_there_are_by_the_name_of_its_own_setting() -> None:
    with pytest.raises(CodebookError, match=r"^k=6 of 5 codes; use --k 5 or less$"):
        TopK(6)(OLD, StoredLatents(torch.empty(0, 2)), COUNTS)


# --- latents as codes ----------------------------------------------------------------------------------------------


@each_seeded
@pytest.mark.parametrize("k", [1, 3, 20, 200])
def test_all_codes_are_latents_and_none_stands_there_twice(init: str, k: int) -> None:
    points, old = normal(200, 2), Codebook(OLD.vectors, COSINE_UNIT)
    found = SEEDED[init](k, seed=3)(old, StoredLatents(points, 30), COUNTS)
    rows = rows_of(found.codebook.vectors)
    assert len(rows) == len(set(rows)) == k and set(rows) <= set(rows_of(points))
    assert found.index_map.tolist() == [REMOVED] * 5
    assert found.codebook.metric == COSINE_UNIT


@each_seeded
def test_the_codes_are_the_seeds_of_kmeans(init: Any) -> None:
    points = normal(500, 2)
    for k, seed in ((2, 0), (9, 0), (9, 5), (9, -1), (9, 2**63)):
        found = SEEDED[init](k, seed=seed)(OLD, StoredLatents(points), COUNTS)
        assert torch.equal(found.codebook.vectors, seeds(points, k, init, seed))


@each_seeded
def test_neither_old_codes_nor_counts_matter(init: str) -> None:
    points = normal(50, 2)
    one = SEEDED[init](4)(OLD, StoredLatents(points), COUNTS)
    other = SEEDED[init](4)(Codebook(OLD.vectors[:2] + 9), StoredLatents(points), torch.tensor([0, 0]))
    assert torch.equal(one.codebook.vectors, other.codebook.vectors)


def test_random_latents_are_drawn_alike() -> None:
    """Two of 0, 1, 2, 30: each of six pairs a sixth of the time, however far they lie apart."""
    points, draws = torch.tensor([[0.0], [1.0], [2.0], [30.0]]), 1200
    pairs: Counter[frozenset[float]] = Counter()
    for seed in range(draws):
        found = RandomLatents(2, seed)(Codebook(torch.zeros(1, 1)), StoredLatents(points), torch.tensor([4]))
        pairs[frozenset(found.codebook.vectors.flatten().tolist())] += 1
    assert len(pairs) == 6
    assert all(count / draws == pytest.approx(1 / 6, abs=4 * (5 / 36 / draws) ** 0.5) for count in pairs.values())


def test_kmeans_seeds_leave_as_little_error_as_scikit_learns() -> None:
    """Both draw a few points for each seed and keep the best: means over twenty draws, which are unlike."""
    points, k = normal(400, 3), 20

    def mean_error(draws: Iterable[Tensor]) -> float:
        return float(np.mean([float(torch.cdist(points, seeds).amin(1).square().sum()) for seeds in draws]))

    theirs = mean_error(torch.from_numpy(kmeans_plusplus(points.numpy(), k, random_state=s)[0]) for s in range(20))
    old, counts = Codebook(torch.zeros(2, 3)), torch.tensor([400, 0])
    ours = mean_error(KmeansSeeds(k, s)(old, StoredLatents(points), counts).codebook.vectors for s in range(20))
    assert ours == pytest.approx(theirs, rel=0.04)


def test_kmeans_seeds_lie_in_far_blobs_that_random_latents_miss() -> None:
    """Nine of ten latents lie about 0; eight blobs share the others: seeds by distance find all nine."""
    centres = torch.cat([torch.zeros(1, 2), 1000 * normal(8, 2, seed=1)])
    labels = torch.cat([torch.zeros(900, dtype=torch.int64), torch.arange(1, 9).repeat_interleave(12)])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    points, old = (centres[labels] + normal(len(labels), 2))[order], Codebook(torch.zeros(1, 2))

    def blobs(strategy: Any) -> int:
        codes = strategy(old, StoredLatents(points), torch.tensor([len(points)])).codebook.vectors
        return len(torch.cdist(codes, centres).argmin(1).unique())

    assert all(blobs(KmeansSeeds(9, seed)) == 9 for seed in range(5))
    assert all(blobs(RandomLatents(9, seed)) < 6 for seed in range(5))


@each_seeded
def test_more_codes_than_distinct_latents_says_how_many_there_are(init: str) -> None:
    latents = StoredLatents(torch.tensor([[0.0, 0.0], [1.0, 0.0], [-0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]).repeat(9, 1))
    with pytest.raises(CodebookError, match=r"k=4 asks for more codes than the 3 distinct latents; use --k 3 or less"):
        SEEDED[init](4)(OLD, latents, COUNTS)
    assert SEEDED[init](3)(OLD, latents, COUNTS).codebook.size == 3


@pytest.mark.parametrize("strategy", [TopK, RandomLatents, KmeansSeeds])
@pytest.mark.parametrize("k", [0, -4])
def test_settings_of_controls_that_make_no_sense_are_the_users_error(strategy: Any, k: int) -> None:
    with pytest.raises(CodebookError, match=f"k={k} is below 1; use --k 1 or more"):
        strategy(k)


# --- the seeds of k-means ------------------------------------------------------------------------------------------


@each_init
def test_seeds_come_from_the_first_head(init: Init) -> None:
    """It has 4,096 points, or eight a seed where those are more."""
    points = normal(9000, 2)
    rows = rows_of(points)
    found = {row for seed in range(60) for row in rows_of(seeds(points, 2, init, seed))}
    assert found <= set(rows[:4096])
    assert any(rows.index(row) > 2000 for row in found)
    many = rows_of(seeds(points, 800, init, 0))
    assert set(many) <= set(rows[:6400]) and any(rows.index(row) > 5000 for row in many)


@each_init
def test_seeds_come_from_all_points_where_repeats_crowd_the_first_head(init: Init) -> None:
    points = torch.cat([torch.zeros(5000, 1), torch.arange(1.0, 3000)[:, None]])
    found = {float(row) for seed in range(10) for row in seeds(points, 2, init, seed)}
    assert max(found) > 1500


@pytest.mark.parametrize("init", ["kmeans++", "afkmc2"])
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_careful_seeds_never_stand_at_one_place_twice(init: Init, numbers: list[int], data: st.DataObject) -> None:
    points = torch.tensor(numbers, dtype=torch.float32)[:, None]
    k = data.draw(st.integers(1, len(set(numbers))))
    found = seeds(points, k, init, data.draw(st.integers(0, 99))).flatten().tolist()
    assert len(found) == len(set(found)) == k and set(found) <= set(numbers)


@each_init
def test_seeds_differ_between_seeds_and_leave_the_points_as_they_are(init: Init) -> None:
    points = normal(300, 3)
    before = points.clone()
    ones = [seeds(points, 8, init, seed) for seed in (0, 0, 1, -1)]
    ones[1].fill_(7)
    assert torch.equal(points, before)
    assert torch.equal(ones[0], seeds(points, 8, init, 0))
    assert all(not torch.equal(ones[0], other) for other in ones[2:])
