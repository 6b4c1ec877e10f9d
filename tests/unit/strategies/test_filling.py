"""Dead codes that bring a codebook to a size: which they are, and that no latent notices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from points import column
from torch import Tensor

from codebook_tools.clustering.assignment import nearest
from codebook_tools.clustering.metric import COSINE_UNIT, METRICS
from codebook_tools.codebook import REMOVED, Codebook, Metric, Surgery
from codebook_tools.data.latents import StoredLatents
from codebook_tools.strategies import Prune
from codebook_tools.strategies.padding import common_sizes, filled, power_of_two, remark

OLD = Codebook(column(0, 10, 20, 30, 40, 50))
COUNTS = torch.tensor([3, 0, 5, 0, 1, 0])


def surgery(vectors: list[float], index_map: list[int]) -> Surgery:
    return Surgery(Codebook(column(*vectors)), torch.tensor(index_map))


PRUNED = surgery([0, 20, 40], [0, REMOVED, 1, REMOVED, 2, REMOVED])


@pytest.mark.parametrize(
    ("before", "size", "vectors", "index_map"),
    [
        # 10 and 30 come back: the lowest indices of those without hits.
        pytest.param(PRUNED, 5, [0, 10, 20, 30, 40], [0, 1, 2, 3, 4, REMOVED], id="dead codes keep their identity"),
        pytest.param(PRUNED, 6, [0, 10, 20, 30, 40, 50], [0, 1, 2, 3, 4, 5], id="all come back"),
        # 0 and 40 had latents, which 20 has now.
        pytest.param(surgery([20], [-1, -1, 0, -1, -1, -1]), 6, [10, 20, 30, 50, 10, 10], [-1, 0, 1, 2, -1, 3],
                     id="codes with hits do not"),
        pytest.param(surgery([7, 3], [-1] * 6), 4, [7, 3, 7, 7], [-1] * 6, id="new codes get copies of the first"),
        # Restarted codes took the place of the dead ones, which must not return beside them.
        pytest.param(surgery([0, 21, 20, 30, 40, 50], [0, -1, 2, 3, 4, 5]), 8, [0, 21, 20, 30, 40, 50, 0, 0],
                     [0, -1, 2, 3, 4, 5], id="moved codes"),
        pytest.param(surgery([5, 45], [0, 0, 0, 1, 1, 1]), 3, [5, 45, 5], [0, 0, 0, 1, 1, 1], id="merged codes"),
    ],
)  # fmt: skip
def test_codes_that_fill(before: Surgery, size: int, vectors: list[float], index_map: list[int]) -> None:
    copies = before.codebook.vectors.clone(), before.index_map.clone()
    padded = filled(before, OLD, COUNTS, size)
    assert padded.codebook.vectors[:, 0].tolist() == vectors and padded.index_map.tolist() == index_map
    assert torch.equal(before.codebook.vectors, copies[0]) and torch.equal(before.index_map, copies[1])


def test_nothing_is_added_where_nothing_is_missing_and_metric_and_bits_stay() -> None:
    assert filled(PRUNED, OLD, COUNTS, 1) is filled(PRUNED, OLD, COUNTS, 3) is PRUNED
    book = Codebook(torch.eye(2), COSINE_UNIT)
    padded = filled(Surgery(book, torch.tensor([REMOVED]), bits=4), book, torch.tensor([1]), 4)
    assert (padded.codebook.metric, padded.bits) == (COSINE_UNIT, 4)


@pytest.mark.parametrize(("codes", "stays"), [(4, False), (5, True)])
def test_more_codes_to_start_with_stay_where_padding_has_fewer(codes: int, stays: bool) -> None:
    first = surgery([*range(codes)], [REMOVED] * 6)
    assert (filled(replace(PRUNED, first=first), OLD, COUNTS, 4).first is first) == stays


def numbers(most: int, max_size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(-most, most), min_size=1, max_size=max_size)


@given(numbers(50, 8), numbers(60, 20), st.integers(1, 9), st.sampled_from([*METRICS.values()]))
def test_no_latent_goes_to_a_code_that_fills(values: list[int], points: list[int], extra: int, metric: Metric) -> None:
    def plane(numbers: list[int]) -> Tensor:
        return torch.tensor([[float(n), float(n * n % 7)] for n in numbers])

    old, latents = Codebook(plane(values), metric), plane(points)
    counts = torch.bincount(nearest(latents, old), minlength=old.size)
    pruned = Prune()(old, StoredLatents(latents), counts)
    padded = filled(pruned, old, counts, pruned.codebook.size + extra)
    assert padded.codebook.size == pruned.codebook.size + extra
    ours, before = nearest(latents, padded.codebook), nearest(latents, pruned.codebook)
    assert torch.equal(padded.codebook.vectors[ours], pruned.codebook.vectors[before])
    kept = padded.index_map != REMOVED
    assert torch.equal(padded.codebook.vectors[padded.index_map[kept]], old.vectors[kept])


@pytest.mark.parametrize(("before", "after", "powers", "expected"), [
    ([16], [10], False, [10]), ([16], [10], True, [16]), ([8, 8, 8], [3, 6, 5], False, [6, 6, 6]),
    ([8, 8], [4, 4], True, [4, 4]), ([8, 8], [9, 8], True, [16, 16]),
    ([8, 4], [3, 2], False, [3, 2]), ([8, 4], [3, 2], True, [4, 2]),
])  # fmt: skip
def test_codebooks_of_one_size_stay_of_one_size(before: Any, after: Any, powers: bool, expected: list[int]) -> None:
    assert common_sizes(before, after, powers) == expected
    assert [power_of_two(size) for size in (1, 2, 3, 5, 511, 512, 513)] == [1, 2, 4, 8, 512, 512, 1024]


def test_a_remark_names_the_codebooks_and_how_many_codes_each_got() -> None:
    assert remark(["a", "b"], [4, 4], [4, 4]) == []
    (warning,) = remark(["a", "b"], [4, 3], [4, 4])
    assert "one size that the config takes, 4" in warning and warning.endswith("1 of b")
    assert remark(list("abcde"), [1, 2, 3, 4, 5], [5] * 5)[0].endswith("4 of a, 3 of b, 2 of c, ...")
