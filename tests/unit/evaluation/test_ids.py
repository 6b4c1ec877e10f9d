"""Ids: tuples of codes are counted exactly in any order, and estimated beyond a limit."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import together

from codebook_tools.evaluation import ids
from codebook_tools.evaluation.accumulators import Sums
from codebook_tools.evaluation.figures import measurement_of
from codebook_tools.evaluation.ids import Distinct, Ids, hashed, share_changed, tuples_of
from codebook_tools.evaluation.one_pass import Batch


def batch(rows: list[tuple[int, ...]], first: int = 0) -> Batch:
    """Items without a grid, and their codes by stage."""
    names = np.arange(first, first + len(rows), dtype=np.uint64)
    return Batch(names, [], [], None, [torch.tensor(stage) for stage in zip(*rows, strict=True)])


def test_an_id_is_of_a_position_of_an_item_without_grid_or_of_an_item_whose_stages_differ() -> None:
    grid = torch.arange(8).reshape(2, 2, 2)
    assert tuples_of([grid, 10 + grid]).tolist() == [[i, 10 + i] for i in range(8)]
    assert tuples_of([torch.tensor([1, 2]), torch.tensor([3, 4])]).tolist() == [[1, 3], [2, 4]]
    coarse = torch.tensor([[8], [9]])
    assert tuples_of([coarse, grid]).tolist() == [[8, 0, 1, 2, 3], [9, 4, 5, 6, 7]]


@pytest.mark.parametrize(("size", "stages"), [(2, 12), (5, 4), (4096, 1)])
def test_all_ids_have_hashes_of_their_own(size: int, stages: int) -> None:
    rows = torch.tensor(list(itertools.product(range(size), repeat=stages)))
    assert len(np.unique(hashed(rows, size))) == size**stages


def test_long_ids_that_differ_in_one_code_have_hashes_of_their_own() -> None:
    rows = torch.randint(0, 1024, (1, 32)).repeat(32 * 1023, 1)
    at = torch.arange(len(rows))
    rows[at, at % 32] = (rows[at, at % 32] + 1 + at // 32) % 1024
    assert len(np.unique(hashed(rows, 1024))) == len(rows)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1), st.integers(0, 5), st.booleans())
def test_sums_of_parts_are_the_whole(rows: list[tuple[int, int]], cut: int, turned: bool) -> None:
    parts = []
    for some in (rows[:cut], rows[cut:]):
        one = Ids(3, 2, seed=0)
        if some:
            one.add(batch(some))
        parts.append(one.done())
    whole = parts[1] + parts[0] if turned else parts[0] + parts[1]
    assert (whole.items, whole.unique) == (len(rows), len(set(rows)))
    assert whole + Distinct.none() + whole is not None and (whole + whole).unique == whole.unique


def test_beyond_the_limit_distinct_ids_are_estimated_alike_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "LIMIT", 1000)
    hashes = hashed(torch.randint(0, 256, (50_000, 3), generator=torch.Generator().manual_seed(0)), 256)
    true = len(np.unique(hashes))
    one, other = (Distinct.none().with_hashes(len(part), part) for part in (hashes[:100], hashes[100:]))
    sums = [one + other, other + one, Distinct.none().with_hashes(len(hashes), hashes)]
    assert len({(of.items, of.halved, of.hashes.tobytes()) for of in sums}) == 1
    assert sums[0].halved and len(sums[0].hashes) <= 1000 and sums[0].unique == pytest.approx(true, rel=0.1)
    monkeypatch.setattr(ids, "LIMIT", 1 << 25)
    assert Distinct.none().with_hashes(len(hashes), hashes).unique == true


def test_changed_ids_are_those_that_the_nearest_maps_do_not_explain() -> None:
    before, after = torch.tensor([[0, 0], [0, 1], [1, 1]]), torch.tensor([[2, 0], [2, 0], [2, 1]])
    first, second = torch.tensor([2, 2]), torch.tensor([0, 1])  # 00 -> 20, 01 -> 21, 11 -> 21
    assert share_changed(before, after, [first, second]) == pytest.approx(1 / 3)
    assert share_changed(before, after[:2], [first, second]) is None


def test_figures_are_in_the_json_of_several_stages_alone() -> None:
    some = Ids(4, 2, seed=0)
    some.add(batch([(0, 1), (0, 1), (3, 1), (1, 3)]))
    sums = Sums(4, 4, Fraction(1), None, (), ids=some.done())
    found = measurement_of(sums, "test").to_json()
    assert found["ids"] == {"items": 4, "unique": 3, "collision_rate": 0.25, "changed": None}
    assert "ids" not in measurement_of(Sums(4, 4, Fraction(1), None, ()), "test").to_json()


def of_parts() -> Any:
    """In one of two processes, of which the second has no batch: the ids of all."""
    some = Ids(8, 2, seed=0)
    if not ids.distributed.rank():
        some.add(batch([(1, 2), (1, 2), (7, 7)]))
    some.merge()
    return [some.done().items, some.done().unique, sorted(some.done().sample.tolist())]  # type: ignore[union-attr]


@pytest.mark.slow
def test_processes_count_what_one_counts() -> None:
    assert together(of_parts) == [[3, 2, [[1, 2], [1, 2], [7, 7]]]] * 2
