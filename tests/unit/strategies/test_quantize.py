"""Quantizing the codebook: pairwise merging against brute force, weighted k-means, and entries rounded to a grid."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from codebook_tools.clustering import pnn
from codebook_tools.clustering.assignment import nearest
from codebook_tools.clustering.metric import COSINE, COSINE_UNIT, DOT
from codebook_tools.clustering.pnn import merge_pairs
from codebook_tools.codebook import EUCLIDEAN, Codebook, Metric, Surgery
from codebook_tools.data.latents import StoredLatents
from codebook_tools.strategies import Quantize
from codebook_tools.strategies.quantize import packed_bytes, round_rows

each_method = pytest.mark.parametrize("method", ["kmeans", "pnn"])


def merged(
    rows: Any, counts: list[int], k: int, method: Any = "pnn", seed: int = 0, metric: Metric = EUCLIDEAN
) -> Surgery:
    codebook = Codebook(torch.as_tensor(rows, dtype=torch.float32), metric)
    return Quantize(k, method, seed=seed)(codebook, StoredLatents(torch.empty(0, codebook.dim)), torch.tensor(counts))


def mapped(surgery: Surgery) -> Any:
    """What became of the old codes, entry by entry."""
    return surgery.codebook.vectors[surgery.index_map].flatten().tolist()


def merge_by_brute_force(rows: list[Any], weights: list[Any], k: int) -> tuple[list[Any], list[int]]:
    """Centers and labels; every pair is compared anew at each step. Fractions make it exact."""
    clusters = [(mass, list(row), [i]) for i, (row, mass) in enumerate(zip(rows, weights, strict=True))]
    while len(clusters) > k:

        def cost(pair: tuple[int, int]) -> Any:
            (n1, c1, _), (n2, c2, _) = clusters[pair[0]], clusters[pair[1]]
            return n1 * n2 / (n1 + n2) * sum((x - y) * (x - y) for x, y in zip(c1, c2, strict=True))

        i, j = min(combinations(range(len(clusters)), 2), key=cost)  # min gives the first among equals
        (n1, c1, members), (n2, c2, others) = clusters[i], clusters.pop(j)
        center = [x + n2 / (n1 + n2) * (y - x) for x, y in zip(c1, c2, strict=True)]
        clusters[i] = (n1 + n2, center, members + others)
    labels = [0] * len(rows)
    for label, (_, _, members) in enumerate(clusters):
        for member in members:
            labels[member] = label
    return [center for _, center, _ in clusters], labels


@pytest.mark.parametrize(("dim", "k"), [(1, 1), (2, 7), (5, 15), (2, 29), (5, 30)])
def test_weighted_codes_are_merged_as_by_brute_force_in_fractions(
    dim: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = np.random.default_rng(dim)
    rows, weights = numbers.normal(size=(30, dim)), numbers.integers(1, 50, 30)
    exact = [[Fraction(x) for x in row] for row in rows.tolist()], [Fraction(w) for w in weights.tolist()]
    expected, expected_labels = merge_by_brute_force(*exact, k)
    for at_once in (64 << 20, 1000):  # costs in one part, and in several
        monkeypatch.setattr("codebook_tools.clustering.pnn._COST_BYTES", at_once)
        centers, labels = merge_pairs(rows, weights.astype(np.float64), k)
        assert labels.tolist() == expected_labels
        assert np.allclose(centers, np.array(expected, dtype=np.float64), rtol=1e-12, atol=1e-12)


@examples(max_examples=150)
@given(
    st.lists(st.tuples(st.integers(-4, 4), st.integers(1, 2)), min_size=1, max_size=24), st.booleans(), st.integers(1)
)
def test_ties_are_merged_as_by_brute_force(codes: list[tuple[int, int]], alike: bool, k: int) -> None:
    """Whole numbers on a line, in float64: nearly every merge is one of several that cost the same."""
    k = 1 + k % len(codes)
    rows, weights = [[float(x)] for x, _ in codes], [1.0 if alike else float(w) for _, w in codes]
    centers, labels = merge_pairs(np.array(rows), np.array(weights), k)
    assert (centers.tolist(), labels.tolist()) == merge_by_brute_force(rows, weights, k)


def merge_by_full_table(rows: Any, weights: Any, k: int) -> tuple[Any, list[int]]:
    """Centers and labels, from a table of all costs in float64 that is searched at each step."""
    centers, mass, labels = rows.copy(), weights.copy(), np.arange(len(rows))
    apart = rows[:, None] - rows
    costs = (apart * apart).sum(2) * (mass[:, None] * mass / (mass[:, None] + mass))
    costs[np.tril_indices(len(rows))] = np.inf
    for _ in range(len(rows) - k):
        i, j = np.unravel_index(costs.argmin(), costs.shape)  # argmin gives the first among equals
        centers[i] += mass[j] / (mass[i] + mass[j]) * (centers[j] - centers[i])
        mass[i] += mass[j]
        labels[labels == j] = i
        row = ((centers - centers[i]) ** 2).sum(1) * (mass * mass[i] / (mass + mass[i]))
        dead = np.isin(np.arange(len(rows)), labels, invert=True)
        costs[i, i + 1 :], costs[:i, i] = row[i + 1 :], row[:i]
        costs[dead], costs[:, dead] = np.inf, np.inf
    kept = np.unique(labels)
    return centers[kept], np.searchsorted(kept, labels).tolist()


@pytest.mark.parametrize("renewed", [0.01, 0.5, 1e9])
@pytest.mark.parametrize("kind", ["normal", "clumps", "copies", "grid", "far from 0", "many dimensions"])
def test_hundreds_of_codes_are_merged_as_by_a_table_of_all_costs(
    kind: str, renewed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a list holds, so that lists are used up, joined and renewed; weights differ by 10,000."""
    monkeypatch.setattr(pnn, "_RENEWED", renewed)
    numbers = np.random.default_rng(len(kind))
    rows = numbers.normal(size=(260, 40 if kind == "many dimensions" else 3))
    weights = np.floor(10 ** numbers.uniform(0, 4, 260))
    if kind == "clumps":
        rows = rows[numbers.integers(0, 20, 260)] + 1e-4 * rows
    elif kind == "copies":
        rows = rows[numbers.integers(0, 60, 260)]
    elif kind == "grid":  # exact in float64, whichever way it is computed: equal costs are equal
        rows, weights = rows.round(), np.ones(260)
    elif kind == "far from 0":
        rows += 1e3
    for k in (1, 37, 130, 259):
        centers, labels = merge_pairs(rows, weights, k)
        expected, expected_labels = merge_by_full_table(rows, weights, k)
        assert labels.tolist() == expected_labels and np.allclose(centers, expected, rtol=1e-12)


@pytest.mark.slow
def test_codes_of_a_large_codebook_are_merged_in_little_memory() -> None:
    """A table of all costs would take 2 GB."""
    rows = np.random.default_rng(0).normal(size=(16_384, 4))
    tracemalloc.start()
    try:
        centers, labels = merge_pairs(rows, np.ones(len(rows)), 16_000)
        assert tracemalloc.get_traced_memory()[1] < 256 << 20
    finally:
        tracemalloc.stop()
    assert len(centers) == 16_000 and len(np.unique(labels)) == 16_000


@each_method
@pytest.mark.parametrize(("rows", "counts", "k", "expected"), [
    # (0, 0) and (0, 2), counted 1 and 3, meet at (0, 1.5); (10, 0) and (12, 0), counted 5 and 5, at (11, 0).
    ([[10, 0], [0, 0], [12, 0], [0, 2]], [5, 1, 5, 3], 2, [11, 0, 0, 1.5, 11, 0, 0, 1.5]),
    # Dead codes pull nothing: the three would outvote the others. 6 is nearer to 10, 4 to 1, 900 to 10.
    ([[6], [0], [4], [2], [900], [10]], [0, 7, 0, 7, 0, 1], 2, [10, 1, 1, 1, 10, 10]),
    # Without any counts all codes weigh alike: (0 + 1 + 5) / 3.
    ([[0], [1], [5], [10], [11], [12]], [0] * 6, 2, [2, 2, 2, 11, 11, 11]),
    # Fewer than k are in use: they stay, with the dead 23, nearer to them than 80 is; that goes to 23.
    ([[0], [23], [20], [80]], [9, 0, 5, 0], 3, [0, 23, 20, 23]),
    # As many codes as there are stay what they are.
    ([[3], [0.1], [-1e-3], [7]], [1, 2, 3, 4], 4, [3, 0.1, -1e-3, 7]),
    ([[3], [0.1], [-1e-3], [7]], [0, 3, 0, 1], 4, [3, 0.1, -1e-3, 7]),
    ([[3], [0.1], [-1e-3], [7]], [0] * 4, 4, [3, 0.1, -1e-3, 7]),
])  # fmt: skip
def test_codes_are_merged_by_hand(
    rows: list[list[float]], counts: list[int], k: int, expected: list[float], method: str
) -> None:
    surgery = merged(rows, counts, k, method)
    assert surgery.codebook.size == k and surgery.bits is None
    assert mapped(surgery) == pytest.approx(expected)


def test_a_used_code_maps_to_what_it_was_merged_into_even_where_another_is_nearer() -> None:
    """Of -3, 0, 2, 4 with counts 1, 1, 1, 3 first 0 and 2 meet at 1, for 1/2 * 4 = 2.

    1 and -3 cost 2*1/3 * 16 = 10.67, 1 and 4 cost 2*3/5 * 9 = 10.8. So 2 ends at -1/3, though it is nearer to 4.
    """
    assert mapped(merged([[-3], [0], [2], [4]], [1, 1, 1, 3], 2)) == pytest.approx([-1 / 3, -1 / 3, -1 / 3, 4])


@each_method
def test_dead_codes_go_by_the_metric_and_codes_are_merged_as_they_are_emitted(method: str) -> None:
    """(0, 1) and (9, 0) stay. The dead (2, 3) is nearer to (0, 1), its angle too; its product with (9, 0) is larger."""
    for metric, expected in ((EUCLIDEAN, [0, 1]), (COSINE, [0, 1]), (DOT, [9, 0])):
        assert mapped(merged([[0, 1], [9, 0], [2, 3]], [4, 4, 0], 2, method, metric=metric))[4:] == expected
    # (3, 0) and (0, 5) at unit length, counted 1 and 3, meet at (1/4, 3/4), and (-7, 0) stays at (-1, 0).
    unit = merged([[3, 0], [0, 5], [-7, 0]], [1, 3, 90], 2, method, metric=COSINE_UNIT)
    assert mapped(unit) == pytest.approx([0.25, 0.75] * 2 + [-1, 0])


@each_method
@examples(max_examples=40)
@given(data=st.data())
def test_merged_codes_are_weighted_means_of_the_codes_in_use_that_map_to_them(method: str, data: Any) -> None:
    size, dim = data.draw(st.integers(2, 14)), data.draw(st.integers(1, 3))
    rows = torch.from_numpy(np.random.default_rng(data.draw(st.integers(0, 99))).normal(size=(size, dim))).float()
    counts = data.draw(st.lists(st.integers(0, 9), min_size=size, max_size=size).filter(any))
    surgery = merged(rows, counts, data.draw(st.integers(1, sum(c > 0 for c in counts))), method, seed=size)
    weights = torch.tensor(counts, dtype=torch.float64)
    for code, vector in enumerate(surgery.codebook.vectors):
        members = (surgery.index_map == code) & (weights > 0)
        mean = (weights[members, None] * rows[members].double()).sum(0) / weights[members].sum()
        assert torch.allclose(vector.double(), mean, atol=1e-5)
    dead = weights == 0
    assert torch.equal(surgery.index_map[dead], nearest(rows[dead], surgery.codebook))


@pytest.mark.parametrize(("of_rows", "seed"), [(0, 0), (1, 1), (0, -1), (0, 2**63)])
def test_a_count_weighs_as_much_as_so_many_copies_do_for_scikit_learn(of_rows: int, seed: int) -> None:
    numbers = np.random.default_rng(of_rows)
    rows, counts = numbers.normal(size=(40, 2)).astype(np.float32), numbers.integers(1, 30, 40) ** 2
    copies = KMeans(5, n_init=10, random_state=of_rows).fit(np.repeat(rows, counts, axis=0).astype(np.float64))
    surgeries = [merged(rows, weights, 5, "kmeans", seed) for weights in (counts.tolist(), [1] * 40)]
    new = [np.reshape(mapped(surgery), rows.shape) for surgery in surgeries]
    errors = [(counts * np.square(rows.astype(np.float64) - codes).sum(1)).sum() for codes in new]
    assert errors[0] <= 1.01 * copies.inertia_
    assert errors[1] > 1.02 * copies.inertia_  # so that the one percent means something


BITS = tuple(range(2, 9))
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
ROWS = st.integers(1, 5).flatmap(lambda dim: st.lists(st.lists(FINITE, min_size=dim, max_size=dim), min_size=1))
TINIEST, MOST = float(np.finfo(np.float32).smallest_subnormal), float(np.finfo(np.float32).max)


@pytest.mark.parametrize(("row", "bits", "expected"), [
    ([1.0, 0.4, -0.6, 0.0], 2, [1, 0, -1, 0]),  # levels -1, 0, 1
    ([3.0, 1.4, -0.6, 2.6, -1.6], 3, [3, 1, -1, 3, -2]),  # the seven whole numbers from -3 to 3
    ([-3.0, 1.4, 0.4], 3, [-3, 1, 0]),  # the largest may be negative: no level is left over on either side
    ([7.0, 0.5, 1.5, 2.5, -2.5], 4, [7, 0, 2, 2, -2]),  # halves go to the even level
    ([0.75, 0.3, -0.6], 3, [0.75, 0.25, -0.5]),  # steps of 1/4
    ([127.0, 63.4, -0.6], 8, [127, 63, -1]), ([0.0, -0.0, 0.0], 5, [0, 0, 0]),
    ([TINIEST, 0, -TINIEST], 3, [TINIEST, 0, -TINIEST]), ([MOST, TINIEST, -MOST], 8, [MOST, 0, -MOST]),
])  # fmt: skip
def test_each_row_is_rounded_by_hand_with_a_step_of_its_own(row: list[float], bits: int, expected: list[float]) -> None:
    rows = torch.tensor([[100.0] * len(row), row])
    assert round_rows(rows, bits)[1].tolist() == expected


@given(ROWS, st.sampled_from(BITS))
def test_every_entry_goes_to_the_nearest_of_all_levels_and_stays_there(rows: list[list[float]], bits: int) -> None:
    old = torch.tensor(rows)
    new = round_rows(old, bits)
    assert new.dtype == torch.float32 and bool(torch.isfinite(new).all())
    assert torch.equal(round_rows(new, bits), new) and torch.equal(round_rows(-old, bits), -new)
    for row, rounded in zip(old.double().numpy(), new.double().numpy(), strict=True):
        largest = np.abs(row).max()
        levels = np.linspace(-largest, largest, 2**bits - 1)
        rounding = largest * 2**-23 + TINIEST  # of float32, which holds no finer number
        least = np.abs(row[:, None] - levels).min(1)
        assert np.all(np.abs(row - rounded) <= least + rounding)
        assert np.all(np.abs(rounded[:, None] - levels).min(1) <= rounding)
        assert np.abs(rounded).max() == largest


def test_a_rounded_codebook_keeps_its_codes_and_says_its_bits() -> None:
    codebook = Codebook(torch.tensor([[1.0, 0.4], [-0.2, 0.9], [7.0, 7.0]]), COSINE_UNIT)
    surgery = Quantize(bits=2)(codebook, StoredLatents(torch.empty(0, 2)), torch.tensor([4, 0, 1]))
    assert surgery.codebook.vectors.tolist() == pytest.approx(torch.tensor([[1, 0], [0, 0.9], [7, 7]]))
    assert surgery.index_map.tolist() == [0, 1, 2] and surgery.bits == 2


def test_packed_bytes_are_those_of_packed_bits_and_steps() -> None:
    for bits, (size, dim) in product(BITS, ((1, 1), (3, 5), (7, 9), (512, 64))):
        packed = np.packbits(np.zeros(size * dim * bits, dtype=bool)).nbytes + np.zeros(size, dtype=np.float32).nbytes
        assert packed_bytes(Codebook(torch.zeros(size, dim)), bits) == packed
