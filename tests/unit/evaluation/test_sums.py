"""Sums of a pass: the same in any order and number of parts, and whole again after they were packed."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from functools import reduce
from operator import add
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sources_of_images import Images, find_images

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.accumulators import BookSums, Sums, exact, from_limbs, limbs
from codebook_tools.evaluation.figures import measurement_of
from codebook_tools.evaluation.measure import measure, reconstructions, totals_of
from codebook_tools.evaluation.one_pass import run_pass
from codebook_tools.models.load import load_model
from codebook_tools.runtime.progress import Watch

FINITE = st.floats(allow_nan=False, allow_infinity=False, max_value=1e30, min_value=-1e30)


def one(counts: list[int], error: float, near: int | None = None, similarity: float | None = None) -> Sums:
    book = BookSums("codes", 4, torch.tensor(counts), exact(error), near)
    return Sums(1, 12, exact(error / 2), None if similarity is None else exact(similarity), (book,))


def numbers(sums: Sums) -> tuple[object, ...]:
    """Everything in it, comparable."""
    books = [(book.key, book.dim, book.counts.tolist(), book.error, book.near) for book in sums.books]
    return sums.images, sums.values, sums.error, sums.similarity, books


def test_sums_add_up_by_hand() -> None:
    total = one([1, 0, 2], 0.5, near=2, similarity=0.25) + one([0, 0, 4], 1.5, near=3, similarity=0.5)
    assert numbers(total) == (2, 24, 1, Fraction(3, 4), [("codes", 4, [1, 0, 6], 2, 5)])


def test_what_one_part_lacks_the_whole_lacks() -> None:
    total = one([1], 0.5, near=2, similarity=0.25) + one([1], 0.5)
    assert total.similarity is None and total.books[0].near is None


@given(st.lists(FINITE, max_size=30), st.randoms())
def test_no_order_of_adding_changes_a_sum(errors: list[float], shuffle: random.Random) -> None:
    parts = [one([i, 1], error, near=i, similarity=error) for i, error in enumerate(errors)]
    nothing = one([0, 0], 0.0, near=0, similarity=0.0)
    total = reduce(add, parts, nothing)
    shuffle.shuffle(parts)
    first, second = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    in_two = reduce(add, second, nothing) + reduce(add, first, nothing)
    assert numbers(in_two)[2:] == numbers(total)[2:]
    assert float(total.error) == math.fsum(error / 2 for error in errors)  # the standard library's exact sum


@given(st.lists(st.floats(min_value=0, max_value=1e9), min_size=1, max_size=50))
def test_limbs_hold_what_errors_of_any_size_add_up_to(errors: list[float]) -> None:
    total = sum(map(exact, errors), Fraction(0))
    held = limbs(total)
    assert held.dtype == torch.float64 and held.shape == (3,) and float(held[0]) == float(total)
    assert abs(from_limbs(held) - total) <= total / 2**150


@pytest.mark.parametrize("near", [None, 7])
@pytest.mark.parametrize("similarity", [None, 0.1])
def test_packed_sums_are_those_that_were_packed_and_add_up_as_they_do(
    near: int | None, similarity: float | None
) -> None:
    a, b = (one([i, 5 * i], i / 7, near, similarity) for i in (1, 3))
    assert numbers(b.unpacked(*a.packed())) == numbers(a)
    integers, floats = (x + y for x, y in zip(a.packed(), b.packed(), strict=True))
    summed = a.unpacked(integers, floats)
    assert (integers.dtype, floats.dtype) == (torch.int64, torch.float64)
    assert numbers(summed)[:2] == numbers(a + b)[:2] and summed.books[0].near == (a + b).books[0].near
    assert torch.equal(summed.books[0].counts, (a + b).books[0].counts)
    assert float(summed.error) == pytest.approx(float((a + b).error), rel=1e-15)
    assert (summed.similarity is None) == (similarity is None)


def test_what_overflows_is_named() -> None:
    with pytest.raises(CodebookError, match="too large for float32"):
        exact(math.inf)


@pytest.mark.parametrize("parts", [1, 2, 3, 11])
def test_parts_of_a_pass_add_up_to_the_pass(parts: int, tiny: Path, images_folder: Path) -> None:
    """11 parts of 9 batches: two are of nothing."""
    model, items = load_model(read_checkpoint(tiny)), find_images([images_folder])

    def part(i: int, parts: int) -> Sums:
        images = Images(items, 3, 4)
        images.part = i, parts
        totals = totals_of(model, [0.5])
        run_pass(reconstructions(model, images, 7), [totals], Watch())
        return totals.sums

    whole = part(0, 1)
    total = reduce(add, (part(i, parts) for i in reversed(range(parts))))
    assert numbers(total) == numbers(whole) and whole.images == 60
    assert measurement_of(total, "test") == measure(
        model, Images(items, 3, 4), batch=7, references=[0.5], watch=Watch()
    )
