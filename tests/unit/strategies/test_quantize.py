"""Quantising the codebook: pairwise merging against brute force, weighted k-means, and entries rounded to a grid."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor

from codebook_tools.clustering.assignment import nearest
from codebook_tools.clustering.metric import COSINE, COSINE_UNIT, DOT
from codebook_tools.clustering.pnn import merge_pairs
from codebook_tools.codebook import EUCLIDEAN, Codebook, Metric, Surgery
from codebook_tools.data.latents import StoredLatents
from codebook_tools.errors import CodebookError
from codebook_tools.strategies import Quantize
from codebook_tools.strategies.quantize import packed_bytes, round_rows

METHODS = ("kmeans", "pnn")
each_method = pytest.mark.parametrize("method", METHODS)


def merged(
    rows: Any, counts: list[int], k: int, method: Any = "pnn", seed: int = 0, metric: Metric = EUCLIDEAN
) -> Surgery:
    codebook = Codebook(torch.as_tensor(rows, dtype=torch.float32), metric)
    return Quantize(k, method, seed=seed)(codebook, StoredLatents(torch.empty(0, codebook.dim)), torch.tensor(counts))


def distortion(rows: Tensor, counts: Tensor, surgery: Surgery) -> float:
    """Sum over old codes of their use times the squared distance to the code that they map to."""
    away = (rows.double() - surgery.codebook.vectors.double()[surgery.index_map]).square().sum(1)
    return float((counts * away).sum())


# --- pairwise merging ----------------------------------------------------------------------------------------------


def merge_by_brute_force(rows: list[Any], weights: list[Any], k: int) -> tuple[list[Any], list[int], list[Any]]:
    """Centroids, labels and the cost of each merge; every pair is looked at anew at each step, the first among equals.

    rows and weights: of whatever numbers; Fractions make it exact.
    """
    clusters = [(mass, list(row), [i]) for i, (row, mass) in enumerate(zip(rows, weights, strict=True))]
    costs = []
    while len(clusters) > k:

        def cost(pair: tuple[int, int]) -> Any:
            (n1, c1, _), (n2, c2, _) = clusters[pair[0]], clusters[pair[1]]
            return n1 * n2 / (n1 + n2) * sum((x - y) * (x - y) for x, y in zip(c1, c2, strict=True))

        i, j = min(combinations(range(len(clusters)), 2), key=cost)  # min gives the first among equals
        costs.append(cost((i, j)))
        (n1, c1, members), (n2, c2, others) = clusters[i], clusters.pop(j)
        centre = [x + n2 / (n1 + n2) * (y - x) for x, y in zip(c1, c2, strict=True)]
        clusters[i] = (n1 + n2, centre, members + others)
    labels = [0] * len(rows)
    for label, (_, _, members) in enumerate(clusters):
        for member in members:
            labels[member] = label
    return [centre for _, centre, _ in clusters], labels, costs


def as_arrays(rows: list[Any], weights: list[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.array(rows, dtype=np.float64).reshape(len(rows), -1), np.array(weights, dtype=np.float64)


def test_four_codes_are_merged_into_two_by_hand() -> None:
    """Of the six pairs of 0, 1, 4, 6 with weights 1, 3, 1, 1 the cheapest is 0 and 1: 1*3/4 * 1 = 3/4, to 3/4.

    Then 4 and 6, for 1/2 * 4 = 2, to 5; not 3/4 and 4, for 4*1/5 * (13/4)**2 = 8.45.
    """
    rows, weights = as_arrays([0, 1, 4, 6], [1, 3, 1, 1])
    centres, labels = merge_pairs(rows, weights, 3)
    assert (centres.flatten().tolist(), labels.tolist()) == ([0.75, 4, 6], [0, 0, 1, 2])
    centres, labels = merge_pairs(rows, weights, 2)
    assert (centres.flatten().tolist(), labels.tolist()) == ([0.75, 5], [0, 0, 1, 1])


def test_the_cheapest_pair_need_not_be_the_nearest() -> None:
    """0 and 1 are nearest, but heavy: 100*100/200 * 1 = 50. 1 and 4 cost 100*1/101 * 9 = 8.9."""
    centres, labels = merge_pairs(*as_arrays([0, 1, 4], [100, 100, 1]), 2)
    assert labels.tolist() == [0, 1, 1]
    assert centres.flatten().tolist() == pytest.approx([0, (100 * 1 + 1 * 4) / 101])


def test_the_first_of_equal_pairs_is_merged_and_labels_are_in_order_of_first_members() -> None:
    """All neighbours of 0, 1, 2, 3 cost 1/2: (0, 1) goes first, and from 1/2 the code 2 is dearer than (2, 3)."""
    rows, weights = as_arrays([0, 1, 2, 3], [1, 1, 1, 1])
    assert merge_pairs(rows, weights, 3)[1].tolist() == [0, 0, 1, 2]
    assert merge_pairs(rows, weights, 2)[1].tolist() == [0, 0, 1, 1]
    rows, weights = as_arrays([9, 2, 9, 2, 9, 5], [1, 1, 1, 1, 1, 1])  # copies cost nothing
    centres, labels = merge_pairs(rows, weights, 3)
    assert (centres.flatten().tolist(), labels.tolist()) == ([9, 2, 5], [0, 1, 0, 1, 0, 2])
    assert merge_pairs(rows, weights, 4)[1].tolist() == [0, 1, 0, 2, 0, 3]  # (0, 2), (0, 4), and (1, 3) would be next


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("k", [1, 2, 7, 15, 29, 30])
def test_thirty_weighted_codes_are_merged_as_by_brute_force_in_exact_numbers(dim: int, k: int) -> None:
    for seed in range(2):
        numbers = np.random.default_rng(seed)
        rows, weights = numbers.normal(size=(30, dim)), numbers.integers(1, 50, 30)
        expected, expected_labels, costs = merge_by_brute_force(
            [[Fraction(x) for x in row] for row in rows.tolist()], [Fraction(w) for w in weights.tolist()], k
        )
        centres, labels = merge_pairs(rows, weights.astype(np.float64), k)
        assert labels.tolist() == expected_labels
        assert np.allclose(centres, np.array(expected, dtype=np.float64), rtol=1e-12, atol=1e-12)
        # What the merges cost is what they add to the weighted distortion, which is zero before.
        added = (weights[:, None] * (rows - centres[labels]) ** 2).sum()
        assert added == pytest.approx(float(sum(costs)), rel=1e-9, abs=1e-12)


@examples(max_examples=150)
@given(
    st.lists(st.tuples(st.integers(-4, 4), st.integers(1, 2)), min_size=1, max_size=24), st.booleans(), st.integers(1)
)
def test_ties_are_merged_as_by_brute_force(codes: list[tuple[int, int]], alike: bool, k: int) -> None:
    """Whole numbers on a line, most of them repeated: nearly every merge is one of several that cost the same.

    One dimension, in float64: then both round alike.
    """
    k = 1 + k % len(codes)
    rows, weights = [[float(x)] for x, _ in codes], [1.0 if alike else float(w) for _, w in codes]
    expected, expected_labels, _ = merge_by_brute_force(rows, weights, k)
    centres, labels = merge_pairs(*as_arrays(rows, weights), k)
    assert labels.tolist() == expected_labels
    assert centres.tolist() == expected


@examples(max_examples=50)
@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=2, max_size=24))
def test_copies_are_merged_before_all_others(rows: list[tuple[int, int]]) -> None:
    distinct = list(dict.fromkeys(rows))
    centres, labels = merge_pairs(*as_arrays(rows, [1] * len(rows)), len(distinct))
    assert centres.tolist() == [list(row) for row in distinct]
    assert labels.tolist() == [distinct.index(row) for row in rows]


def test_costs_that_do_not_fit_in_one_look_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.random.default_rng(0)
    rows, weights = numbers.integers(-9, 10, (60, 2)).astype(np.float64), numbers.integers(1, 9, 60).astype(np.float64)
    centres, labels = merge_pairs(rows, weights, 11)
    monkeypatch.setattr("codebook_tools.clustering.pnn._LOOK_BYTES", 2000)
    assert np.array_equal(merge_pairs(rows, weights, 11)[0], centres)
    assert np.array_equal(merge_pairs(rows, weights, 11)[1], labels)


# --- merged codebooks ----------------------------------------------------------------------------------------------


@each_method
def test_two_of_four_codes_by_hand(method: str) -> None:
    """(0, 0) and (0, 2), counted 1 and 3, meet at (0, 1.5); (10, 0) and (12, 0), counted 5 and 5, at (11, 0)."""
    found = merged([[10, 0], [0, 0], [12, 0], [0, 2]], [5, 1, 5, 3], 2, method)
    assert found.codebook.size == 2
    assert found.codebook.vectors[found.index_map].flatten().tolist() == pytest.approx([11, 0, 0, 1.5, 11, 0, 0, 1.5])
    assert found.bits is None


@each_method
def test_dead_codes_pull_nothing_and_go_where_they_are_nearest(method: str) -> None:
    """The three dead codes would outvote the others. 6 lies nearer to 10, 4 nearer to 1, 900 nearer to 10."""
    found = merged([[6], [0], [4], [2], [900], [10]], [0, 7, 0, 7, 0, 1], 2, method)
    assert sorted(found.codebook.vectors.flatten().tolist()) == pytest.approx([1, 10])
    assert found.codebook.vectors[found.index_map].flatten().tolist() == pytest.approx([10, 1, 1, 1, 10, 10])


def test_a_used_code_maps_to_what_it_was_merged_into_even_where_another_is_nearer() -> None:
    """Of -3, 0, 2, 4 with counts 1, 1, 1, 3 first 0 and 2 meet at 1, for 1/2 * 4 = 2.

    1 and -3 cost 2*1/3 * 16 = 10.67, 1 and 4 cost 2*3/5 * 9 = 10.8. So 2 ends at -1/3, though it is nearer to 4.
    """
    found = merged([[-3], [0], [2], [4]], [1, 1, 1, 3], 2)
    assert found.codebook.vectors.flatten().tolist() == pytest.approx([-1 / 3, 4])
    assert found.index_map.tolist() == [0, 0, 0, 1]


@each_method
def test_a_dead_code_goes_where_the_lookup_of_the_codebook_finds_it_nearest(method: str) -> None:
    """(0, 1) and (9, 0) stay. The dead (2, 3) is nearer to (0, 1), its angle too; its product with (9, 0) is larger."""
    rows, counts = [[0, 1], [9, 0], [2, 3]], [4, 4, 0]
    for metric, expected in ((EUCLIDEAN, [0, 1]), (COSINE, [0, 1]), (DOT, [9, 0])):
        found = merged(rows, counts, 2, method, metric=metric)
        assert found.codebook.vectors[found.index_map[2]].tolist() == expected
        assert found.codebook.metric is metric


@each_method
def test_codes_are_merged_as_the_decoder_gets_them(method: str) -> None:
    """(3, 0) and (0, 5) at unit length, counted 1 and 3, meet at (1/4, 3/4), and (-7, 0) stays at (-1, 0)."""
    codebook = Codebook(torch.tensor([[3.0, 0.0], [0.0, 5.0], [-7.0, 0.0]]), COSINE_UNIT)
    found = Quantize(2, method)(codebook, StoredLatents(torch.empty(0, 2)), torch.tensor([1, 3, 90]))  # type: ignore[arg-type]
    assert found.codebook.vectors[found.index_map].flatten().tolist() == pytest.approx([0.25, 0.75] * 2 + [-1, 0])
    assert found.codebook.metric == COSINE_UNIT


@each_method
def test_without_any_counts_all_codes_weigh_alike(method: str) -> None:
    rows = [[0], [1], [5], [10], [11], [12]]
    found, alike = merged(rows, [0] * 6, 2, method), merged(rows, [3] * 6, 2, method)
    assert sorted(found.codebook.vectors.flatten().tolist()) == pytest.approx([2, 11])  # (0 + 1 + 5) / 3
    assert torch.equal(found.index_map, alike.index_map)
    assert torch.allclose(found.codebook.vectors, alike.codebook.vectors)


@each_method
def test_dead_codes_stay_where_fewer_than_k_are_in_use(method: str) -> None:
    """Only 0 and 20 are counted. The third code is the dead 23, nearer to them than 80 is; that goes to 23."""
    found = merged([[0], [23], [20], [80]], [9, 0, 5, 0], 3, method)
    assert found.codebook.vectors.flatten().tolist() == [0, 23, 20]
    assert found.index_map.tolist() == [0, 1, 2, 1]


@each_method
@pytest.mark.parametrize("counts", [[1, 2, 3, 4], [0, 3, 0, 1], [0, 0, 0, 0]])
def test_as_many_codes_as_there_are_stay_what_they_are(method: str, counts: list[int]) -> None:
    rows = torch.tensor([[3.0, 1.0], [0.1, 0.0], [3.0, 2.0], [-1e-3, 7.0]])
    found = merged(rows, counts, 4, method)
    assert torch.equal(found.codebook.vectors[found.index_map], rows)
    assert sorted(found.index_map.tolist()) == [0, 1, 2, 3]
    if method == "pnn":
        assert found.index_map.tolist() == [0, 1, 2, 3]


@each_method
@examples(max_examples=40)
@given(data=st.data())
def test_each_merged_code_is_the_weighted_mean_of_the_codes_in_use_that_map_to_it(
    method: str, data: st.DataObject
) -> None:
    size, dim = data.draw(st.integers(2, 14)), data.draw(st.integers(1, 3))
    rows = torch.from_numpy(np.random.default_rng(data.draw(st.integers(0, 99))).normal(size=(size, dim))).float()
    counts = data.draw(st.lists(st.integers(0, 9), min_size=size, max_size=size).filter(any))
    found = merged(rows, counts, data.draw(st.integers(1, sum(c > 0 for c in counts))), method, seed=size)
    weights = torch.tensor(counts, dtype=torch.float64)
    for code, vector in enumerate(found.codebook.vectors):
        members = (found.index_map == code) & (weights > 0)
        mean = (weights[members, None] * rows[members].double()).sum(0) / weights[members].sum()
        assert torch.allclose(vector.double(), mean, atol=1e-5)
    dead = weights == 0
    assert torch.equal(found.index_map[dead], nearest(rows[dead], found.codebook))


def test_two_clusters_of_six_codes_are_the_best_of_all_partitions() -> None:
    for seed in range(20):
        numbers = np.random.default_rng(seed)
        rows = torch.from_numpy(numbers.normal(size=(6, 2))).float()
        counts = torch.from_numpy(numbers.integers(1, 20, 6))
        best = np.inf
        for others in product((0, 1), repeat=5):
            if any(others):
                labels = torch.tensor([0, *others])
                best = min(best, sum(scatter(rows[labels == c], counts[labels == c]) for c in (0, 1)))
        assert distortion(rows, counts, merged(rows, counts.tolist(), 2, "kmeans")) == pytest.approx(best, rel=1e-5)
        assert distortion(rows, counts, merged(rows, counts.tolist(), 2, "pnn")) >= best * (1 - 1e-5)


def scatter(rows: Tensor, counts: Tensor) -> float:
    """Weighted sum of squared distances to the weighted mean."""
    rows, weights = rows.double(), counts.double()[:, None]
    return float((weights * (rows - (weights * rows).sum(0) / weights.sum()).square()).sum())


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_count_weighs_as_much_as_so_many_copies_do_for_scikit_learn(seed: int) -> None:
    numbers = np.random.default_rng(seed)
    rows, counts = numbers.normal(size=(40, 2)).astype(np.float32), numbers.integers(1, 30, 40) ** 2
    copies = KMeans(5, n_init=10, random_state=seed).fit(np.repeat(rows, counts, axis=0).astype(np.float64))
    found = merged(rows, counts.tolist(), 5, "kmeans", seed)
    assert distortion(torch.from_numpy(rows), torch.from_numpy(counts), found) == pytest.approx(
        copies.inertia_, rel=0.01
    )
    unweighted = merged(rows, [1] * 40, 5, "kmeans", seed)  # so that the one percent means something
    assert distortion(torch.from_numpy(rows), torch.from_numpy(counts), unweighted) > 1.02 * copies.inertia_


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63])
def test_any_seed_will_do(seed: int) -> None:
    assert merged([[0], [1], [9]], [1, 1, 1], 2, "kmeans", seed).codebook.size == 2


def test_more_codes_than_there_are_says_how_many_there_are() -> None:
    with pytest.raises(CodebookError, match=r"k=4 of 3 codes; use --k 3 or less"):
        merged([[0], [1], [9]], [1, 1, 1], 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either --k, .* or --bits"),
        ({"k": 4, "bits": 4}, "either --k, .* or --bits"),
        ({"k": 0}, "k=0 is below 1; use --k 1 or more"),
        ({"k": -2}, "k=-2 is below 1"),
        ({"bits": 1}, "bits=1 is not within 2 and 8"),
        ({"bits": 0}, "bits=0 is not within 2 and 8"),
        ({"bits": 9}, "bits=9 is not within 2 and 8"),
        ({"k": 4, "method": "x"}, "method=x is neither kmeans nor pnn"),
    ],
)
def test_settings_of_quantize_that_make_no_sense_are_the_users_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CodebookError, match=message):
        Quantize(**settings)


# --- entries rounded to a grid -------------------------------------------------------------------------------------

BITS = tuple(range(2, 9))
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
ROWS = st.integers(1, 5).flatmap(lambda dim: st.lists(st.lists(FINITE, min_size=dim, max_size=dim), min_size=1))
TINIEST = float(np.finfo(np.float32).smallest_subnormal)


def rounded(row: list[float], bits: int) -> list[float]:
    found: list[float] = round_rows(torch.tensor([row]), bits)[0].tolist()
    return found


@pytest.mark.parametrize(
    ("row", "bits", "expected"),
    [
        ([1.0, 0.4, -0.6, 0.0], 2, [1, 0, -1, 0]),  # levels -1, 0, 1
        ([3.0, 1.4, -0.6, 2.6, -1.6], 3, [3, 1, -1, 3, -2]),  # the seven whole numbers from -3 to 3
        ([-3.0, 1.4, 0.4], 3, [-3, 1, 0]),  # the largest may be negative: no level is left over on either side
        ([7.0, 0.5, 1.5, 2.5, -2.5], 4, [7, 0, 2, 2, -2]),  # halves go to the even level
        ([0.75, 0.3, -0.6], 3, [0.75, 0.25, -0.5]),  # steps of 1/4
        ([127.0, 63.4, -0.6], 8, [127, 63, -1]),
        ([0.0, -0.0, 0.0], 5, [0, 0, 0]),
    ],
)
def test_a_row_is_rounded_by_hand(row: list[float], bits: int, expected: list[float]) -> None:
    assert rounded(row, bits) == expected


def test_each_row_has_steps_of_its_own() -> None:
    rows = torch.tensor([[1.0, 0.3], [100.0, 40.0], [0.0, 0.0], [-1e-3, 6e-4]])
    assert round_rows(rows, 2).tolist() == pytest.approx(torch.tensor([[1, 0], [100, 0], [0, 0], [-1e-3, 1e-3]]))


@given(ROWS, st.sampled_from(BITS))
def test_every_entry_goes_to_the_nearest_of_all_levels(rows: list[list[float]], bits: int) -> None:
    old = torch.tensor(rows)
    new = round_rows(old, bits)
    assert new.dtype == torch.float32 and bool(torch.isfinite(new).all())
    for row, found in zip(old.double().numpy(), new.double().numpy(), strict=True):
        largest = np.abs(row).max()
        levels = np.linspace(-largest, largest, 2**bits - 1)
        rounding = largest * 2**-23 + TINIEST  # of float32, which holds no finer number
        least = np.abs(row[:, None] - levels).min(1)
        assert np.all(np.abs(row - found) <= least + rounding)
        assert np.all(np.abs(found[:, None] - levels).min(1) <= rounding)
        assert np.all(np.abs(row - found) <= largest / (2**bits - 2) + rounding)
        assert np.abs(found).max() == largest


@given(ROWS, st.sampled_from(BITS))
def test_rounding_twice_is_rounding_once_and_signs_make_no_difference(rows: list[list[float]], bits: int) -> None:
    old = torch.tensor(rows)
    once = round_rows(old, bits)
    assert torch.equal(round_rows(once, bits), once)
    assert torch.equal(round_rows(-old, bits), -once)
    assert torch.equal(round_rows(old.flip(0), bits).flip(0), once)


@pytest.mark.parametrize("bits", BITS)
def test_half_a_step_is_reached_and_no_more(bits: int) -> None:
    """Entries all over [-1, 1]: the largest move is 1 / (2**bits - 2), and all levels are in use."""
    row = torch.linspace(-1, 1, 100_001)[None]
    new = round_rows(row, bits)
    assert float((new - row).abs().max()) == pytest.approx(1 / (2**bits - 2), rel=0.01)
    assert new.unique().tolist() == pytest.approx(np.linspace(-1, 1, 2**bits - 1).tolist())


@pytest.mark.parametrize("bits", BITS)
def test_the_smallest_and_largest_numbers_of_float32_stay_finite(bits: int) -> None:
    most = float(np.finfo(np.float32).max)
    assert rounded([TINIEST, 0, -TINIEST], bits) == [TINIEST, 0, -TINIEST]
    assert rounded([most, 0, -most], bits) == [most, 0, -most]
    assert rounded([most, TINIEST], bits) == [most, 0]


def test_the_error_falls_with_every_bit_to_half_a_percent_at_eight() -> None:
    rows = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    errors = [float((round_rows(rows, bits) - rows).norm() / rows.norm()) for bits in BITS]
    assert all(more > 1.8 * fewer for more, fewer in pairwise(errors))
    # A uniform error has a root mean square of step / sqrt(12): of rows of unit normals with a largest entry of 2.2.
    assert errors[-1] == pytest.approx(2.2 / 127 / 12**0.5, rel=0.1)


def test_a_rounded_codebook_keeps_its_codes_and_says_its_bits() -> None:
    rows = torch.tensor([[1.0, 0.4], [-0.2, 0.9], [7.0, 7.0]])
    codebook = Codebook(rows, COSINE_UNIT)
    found = Quantize(bits=2)(codebook, StoredLatents(torch.empty(0, 2)), torch.tensor([4, 0, 1]))
    assert found.codebook.vectors.tolist() == pytest.approx(torch.tensor([[1, 0], [0, 0.9], [7, 7]]))
    assert found.index_map.tolist() == [0, 1, 2] and found.bits == 2
    assert found.codebook.metric == COSINE_UNIT
    assert found.codebook.emitted.norm(dim=1).tolist() == pytest.approx([1, 1, 1])


@pytest.mark.parametrize(
    ("size", "dim", "bits", "expected"),
    [
        (3, 5, 3, 6 + 12),  # 45 bits fill six bytes, and three steps take four each
        (4, 2, 8, 8 + 16),
        (1, 1, 2, 1 + 4),
        (512, 64, 4, 16_384 + 2048),
        (1024, 256, 8, 262_144 + 4096),
    ],
)
def test_packed_bytes_by_hand(size: int, dim: int, bits: int, expected: int) -> None:
    assert packed_bytes(Codebook(torch.zeros(size, dim)), bits) == expected


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(BITS))
def test_packed_bytes_are_those_of_packed_bits_and_steps(size: int, dim: int, bits: int) -> None:
    packed = np.packbits(np.zeros(size * dim * bits, dtype=bool)).nbytes + np.zeros(size, dtype=np.float32).nbytes
    assert packed_bytes(Codebook(torch.zeros(size, dim)), bits) == packed
