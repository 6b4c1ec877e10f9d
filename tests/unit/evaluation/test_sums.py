"""Sums of a pass: the same in any order and number of parts, and whole again after they were packed and stored."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from functools import reduce
from operator import add
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
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


def one(counts: list[int], error: float, near: int | None = None, score: float | None = None) -> Sums:
    book = BookSums("codes", 4, torch.tensor(counts), exact(error), near)
    total = None if score is None else exact(score)
    return Sums(1, 12, exact(error / 2), total, (book,), total, total)


def numbers(sums: Sums) -> tuple[object, ...]:
    """Everything in it, comparable."""
    books = [(book.key, book.dim, book.counts.tolist(), book.error, book.near) for book in sums.books]
    return sums.images, sums.values, sums.error, sums.similarity, sums.detail, sums.reconstructed_detail, books


def test_sums_add_up_by_hand_and_lack_what_a_part_lacks() -> None:
    total = one([1, 0, 2], 0.5, near=2, score=0.25) + one([0, 0, 4], 1.5, near=3, score=0.5)
    assert numbers(total) == (2, 24, 1, *[Fraction(3, 4)] * 3, [("codes", 4, [1, 0, 6], 2, 5)])
    assert numbers(total + one([1, 0, 0], 0.5))[3:] == (*[None] * 3, [("codes", 4, [2, 0, 6], 2.5, None)])


@settings(max_examples=50)
@given(st.lists(FINITE, max_size=30), st.randoms())
def test_no_order_of_adding_changes_a_sum(errors: list[float], shuffle: random.Random) -> None:
    parts = [one([i, 1], error, near=i, score=error) for i, error in enumerate(errors)]
    nothing = one([0, 0], 0.0, near=0, score=0.0)
    total = reduce(add, parts, nothing)
    shuffle.shuffle(parts)
    half = len(parts) // 2
    assert numbers(reduce(add, parts[half:], nothing) + reduce(add, parts[:half], nothing))[2:] == numbers(total)[2:]
    assert float(total.error) == math.fsum(error / 2 for error in errors)  # the standard library's exact sum


@settings(max_examples=50)
@given(st.lists(st.floats(min_value=0, max_value=1e9), min_size=1, max_size=50))
def test_limbs_represent_sums_of_any_size(errors: list[float]) -> None:
    total = sum(map(exact, errors), Fraction(0))
    parts = limbs(total)
    assert parts.dtype == torch.float64 and parts.shape == (3,) and float(parts[0]) == float(total)
    assert abs(from_limbs(parts) - total) <= total / 2**150
    with pytest.raises(CodebookError, match="too large for float32"):
        exact(math.inf)


@pytest.mark.parametrize(("near", "score"), [(None, 0.1), (7, None)])
def test_packed_sums_unpack_and_add_up_as_the_sums_do(near: int | None, score: float | None) -> None:
    a, b = (one([i, 5 * i], i / 7, near, score) for i in (1, 3))
    assert numbers(b.unpacked(*a.packed())) == numbers(a)
    with pytest.raises(ValueError, match="as older versions wrote"):
        a.unpacked(a.packed()[0][1:], a.packed()[1])
    packed = [x + y for x, y in zip(a.packed(), b.packed(), strict=True)]
    assert [tensor.dtype for tensor in packed] == [torch.int64, torch.float64]
    total, expected = a.unpacked(*packed), a + b
    assert (total.images, total.values, total.books[0].near) == (2, 24, expected.books[0].near)
    assert torch.equal(total.books[0].counts, expected.books[0].counts)
    assert float(total.error) == pytest.approx(float(expected.error), rel=1e-15)
    assert (total.similarity is None) == (score is None)


@pytest.mark.parametrize("parts", [2, 11])
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
    assert numbers(total) == numbers(whole) == numbers(whole.unpacked(*whole.packed()))
    assert whole.images == 60 and whole.detail
    result = measure(model, Images(items, 3, 4), batch=7, references=[0.5], watch=Watch())
    assert measurement_of(total, "test") == result
    assert result.sharpness == float(Fraction(whole.reconstructed_detail or 0) / whole.detail)
