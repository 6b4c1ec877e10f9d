"""Dead codes that bring a codebook to a size: which they are, and that no latent notices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from codebook_tools.clustering.assignment import nearest
from codebook_tools.clustering.metric import COSINE_UNIT, METRICS
from codebook_tools.codebook import REMOVED, Codebook, Metric, Surgery
from codebook_tools.data.latents import StoredLatents
from codebook_tools.strategies import Prune
from codebook_tools.strategies.padding import common_sizes, filled, power_of_two, remark

OLD = Codebook(torch.tensor([[0.0], [10.0], [20.0], [30.0], [40.0], [50.0]]))
COUNTS = torch.tensor([3, 0, 5, 0, 1, 0])


def pruned(**settings: int) -> Surgery:
    return Prune(**settings)(OLD, StoredLatents(torch.empty(0, 1)), COUNTS)


def replaced(*vectors: float) -> Surgery:
    """All codes are new ones."""
    return Surgery(Codebook(torch.tensor(vectors)[:, None]), torch.full((6,), REMOVED))


def column(found: Surgery) -> list[float]:
    rows: list[float] = found.codebook.vectors[:, 0].tolist()
    return rows


# --- which codes ---------------------------------------------------------------------------------------------------


def test_removed_codes_without_hits_come_back_and_keep_their_identity() -> None:
    found = filled(pruned(), OLD, COUNTS, 5)
    assert column(found) == [0, 10, 20, 30, 40]  # 10 and 30: the lowest indices of those without hits
    assert found.index_map.tolist() == [0, 1, 2, 3, 4, REMOVED]


def test_where_all_come_back_nothing_has_changed() -> None:
    found = filled(pruned(), OLD, COUNTS, 6)
    assert torch.equal(found.codebook.vectors, OLD.vectors) and found.index_map.tolist() == [*range(6)]


def test_removed_codes_with_hits_do_not_come_back() -> None:
    found = filled(pruned(keep=1), OLD, COUNTS, 6)
    assert column(found) == [10, 20, 30, 50, 10, 10]  # 0 and 40 had latents, which 20 has now
    assert found.index_map.tolist() == [REMOVED, 0, 1, 2, REMOVED, 3]


def test_codes_that_are_new_are_filled_with_copies_of_the_first() -> None:
    surgery = replaced(7.0, 3.0)
    found = filled(surgery, OLD, COUNTS, 4)
    assert column(found) == [7, 3, 7, 7]
    assert found.index_map.tolist() == [REMOVED] * 6 == surgery.index_map.tolist()


def test_where_some_codes_moved_none_comes_back() -> None:
    """Restarted codes took the place of the dead ones, which must not return beside them."""
    vectors = OLD.vectors.clone()
    vectors[1] = 21.0
    surgery = Surgery(Codebook(vectors), torch.tensor([0, REMOVED, 2, 3, 4, 5]))
    found = filled(surgery, OLD, COUNTS, 8)
    assert column(found) == [0, 21, 20, 30, 40, 50, 0, 0] and found.index_map.tolist() == [0, REMOVED, 2, 3, 4, 5]


def test_merged_codes_are_no_selection() -> None:
    """Codes of an index map that names one new code for two old ones, as merging does."""
    surgery = Surgery(Codebook(torch.tensor([[5.0], [45.0]])), torch.tensor([0, 0, 0, 1, 1, 1]))
    found = filled(surgery, OLD, COUNTS, 3)
    assert column(found) == [5, 45, 5] and found.index_map.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("size", [1, 3])
def test_nothing_is_added_where_nothing_is_missing(size: int) -> None:
    surgery = pruned()
    assert filled(surgery, OLD, COUNTS, size) is surgery


def test_lookup_output_and_bits_stay() -> None:
    book = Codebook(torch.eye(2), COSINE_UNIT)
    found = filled(Surgery(book, torch.tensor([REMOVED]), bits=4), book, torch.tensor([1]), 4)
    assert (found.codebook.metric, found.bits) == (COSINE_UNIT, 4)


def test_what_was_given_is_left_as_it_was() -> None:
    surgery = pruned()
    before = surgery.index_map.clone(), surgery.codebook.vectors.clone()
    filled(surgery, OLD, COUNTS, 6)
    assert torch.equal(surgery.index_map, before[0]) and torch.equal(surgery.codebook.vectors, before[1])


@given(
    values=st.lists(st.integers(-50, 50), min_size=1, max_size=8),
    points=st.lists(st.integers(-60, 60), min_size=1, max_size=20),
    extra=st.integers(1, 9),
    metric=st.sampled_from([*METRICS.values()]),
)
def test_no_latent_goes_to_a_code_that_fills(values: list[int], points: list[int], extra: int, metric: Metric) -> None:
    def plane(numbers: list[int]) -> Tensor:
        return torch.tensor([[float(n), float(n * n % 7)] for n in numbers])

    old, latents = Codebook(plane(values), metric), plane(points)
    counts = torch.bincount(nearest(latents, old), minlength=old.size)
    surgery = Prune()(old, StoredLatents(latents), counts)
    found = filled(surgery, old, counts, surgery.codebook.size + extra)
    assert found.codebook.size == surgery.codebook.size + extra
    ours, before = nearest(latents, found.codebook), nearest(latents, surgery.codebook)
    assert torch.equal(found.codebook.vectors[ours], surgery.codebook.vectors[before])
    kept = found.index_map != REMOVED
    assert torch.equal(found.codebook.vectors[found.index_map[kept]], old.vectors[kept])


# --- which sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "powers", "expected"),
    [
        ([16], [10], False, [10]),
        ([16], [10], True, [16]),
        ([8, 8, 8], [3, 6, 5], False, [6, 6, 6]),
        ([8, 8, 8], [3, 6, 5], True, [8, 8, 8]),
        ([8, 8], [4, 4], True, [4, 4]),
        ([8, 8], [4, 8], False, [8, 8]),  # one of the two alone was operated on
        ([8, 8], [9, 8], True, [16, 16]),
        ([8, 4], [3, 2], False, [3, 2]),
        ([8, 4], [3, 2], True, [4, 2]),
    ],
)
def test_codebooks_of_one_size_stay_of_one_size(
    before: list[int], after: list[int], powers: bool, expected: list[int]
) -> None:
    assert common_sizes(before, after, powers) == expected


def test_powers_of_two() -> None:
    assert [power_of_two(size) for size in (1, 2, 3, 4, 5, 511, 512, 513)] == [1, 2, 4, 4, 8, 512, 512, 1024]


def test_a_remark_names_the_codebooks_and_how_many_codes_each_got() -> None:
    assert remark(["a", "b"], [4, 4], [4, 4]) == []
    (said,) = remark(["a", "b"], [4, 3], [4, 4])
    assert "one size that the config takes, 4" in said and said.endswith("1 of b")
    (said,) = remark(list("abcde"), [1, 2, 3, 4, 5], [5] * 5)
    assert said.endswith("4 of a, 3 of b, 2 of c, ...")
