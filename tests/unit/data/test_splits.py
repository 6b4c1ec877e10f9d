"""Splits and draws: by name alone, so that nothing leaks and nothing changes sides."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawing import fake, fakes, names, picture, put
from hypothesis import given, settings
from hypothesis import strategies as st
from sources_of_images import find_images

from codebook_tools.data.items import Item
from codebook_tools.data.splits import Splits, limited, split
from codebook_tools.errors import CodebookError


def sides(splits: Splits) -> dict[str, str]:
    """Name -> the split it is in."""
    return {item.name: part for part in ("train", "validation", "test") for item in getattr(splits, part)}


def test_test_and_validation_are_a_tenth_each_by_the_sha256_of_the_name() -> None:
    items = fakes(3000)
    splits = split(items)
    assert sorted(sides(splits)) == names(items)
    assert names(splits.calibration) == sorted(names(splits.train) + names(splits.validation))
    for name, side in sides(splits).items():
        digest = hashlib.sha256(name.encode()).digest()
        test, validation = (int.from_bytes(digest[at : at + 8], "big") % 10 == 0 for at in (0, 8))
        assert side == ("test" if test else "validation" if validation else "train")


@settings(max_examples=25)
@given(st.sets(st.text("abc/", min_size=1, max_size=6), min_size=60, max_size=120), st.integers(0, 10**6))
def test_an_item_never_changes_sides_when_data_are_added_or_reordered(some: set[str], seed: int) -> None:
    items = [fake(name) for name in some]
    more = [*items, *fakes(200, "other/")]
    shuffled = [more[i] for i in np.random.default_rng(seed).permutation(len(more))]
    try:
        before = sides(split(items))
    except CodebookError:  # by chance without test data
        return
    after = sides(split(shuffled))
    assert all(after[name] == side for name, side in before.items())


TEST, DATA = ([item for item in fakes(400) if item.in_tenth(0) == side] for side in (True, False))


def test_without_test_or_calibration_data_the_split_is_an_error() -> None:
    cases: list[tuple[list[Item], list[Item] | None, str]] = [
        (DATA[:2], None, "the test split of 2 images is empty"),
        (DATA[:3], [], "the test split of 3 images is empty"),
        (TEST[:2], None, "the calibration split of 2 images is empty"),
        ([], None, "the test split"),
        ([replace(item, group="x") for item in TEST[:9]], None, "split of 9 images in 1 groups that stay together"),
    ]
    for data, test, message in cases:
        with pytest.raises(CodebookError, match=message):
            split(data, test)


def test_a_tenth_of_few_items_is_one_of_them_whatever_their_names_and_groups_are_parted_whole() -> None:
    for alike in (TEST, DATA):
        for few in (alike[start : start + count] for count in (3, 4, 7) for start in range(0, 20, count)):
            splits = split(few)
            assert len(splits.test) == 1 and splits.train and splits.validation
            assert sorted(sides(splits)) == names(few)
            assert split(few[::-1]).test == splits.test
    splits = split([replace(item, group=f"recording {i % 3}") for i, item in enumerate(fakes(30))])
    groups = [{item.kin for item in part} for part in (splits.train, splits.validation, splits.test)]
    assert all(len(part) == 1 for part in groups) and len(set.union(*groups)) == 3


def test_with_explicit_test_data_all_of_the_data_is_calibration_data() -> None:
    data, test = ([fake(f"{i}.png", bytes([i])) for i in numbers] for numbers in (range(200), range(200, 230)))
    splits = split(data, test)
    assert splits.test == test and names(splits.calibration) == sorted(names(data))
    assert 0 < len(splits.validation) < 50


def test_a_test_item_that_is_in_the_data_byte_for_byte_is_refused_under_any_name(tmp_path: Path) -> None:
    rows, others = picture(0, (20, 4, 4, 3)), picture(1, (3, 4, 4, 3))
    others[1] = rows[17]
    np.save(tmp_path / "d.npy", rows)
    np.save(tmp_path / "t.npy", others)
    data, test = find_images([tmp_path / "d.npy"]), find_images([tmp_path / "t.npy"])
    with pytest.raises(CodebookError, match=r"test item t.npy#1 is also in --data, as d.npy#17"):
        split(data, test)
    assert split(data, [test[0], test[2]]).test == [test[0], test[2]]


def test_empty_files_in_both_parts_are_not_taken_for_one_image(tmp_path: Path) -> None:
    for part, seed in (("data", 0), ("test", 1)):
        for i, row in enumerate(picture(seed, (20, 8, 8, 3))):
            put(tmp_path / part / f"{part}{i}.png", row)
        (tmp_path / part / f"empty-{part}.png").write_bytes(b"")
    assert len(split(find_images([tmp_path / "data"]), find_images([tmp_path / "test"])).test) == 21


def test_no_limit_or_a_wide_one_takes_all_and_seeds_draw_unlike() -> None:
    items = fakes(20)
    assert all(limited(items, limit, 0) == items for limit in (None, 20, 10**9))
    assert len({tuple(names(limited(items, 10, seed))) for seed in (0, 1, 2)}) == 3


@given(st.integers(0, 60), st.integers(0, 60), st.integers(-(2**63), 2**64 - 1))
def test_a_limit_draws_by_any_seed_alone_and_a_smaller_one_takes_a_part(a: int, b: int, seed: int) -> None:
    items = fakes(60)
    few, many = (names(limited(items, limit, seed)) for limit in sorted((a, b)))
    assert set(few) <= set(many) and (len(few), len(many)) == tuple(sorted((a, b)))
    assert many == sorted(many) and set(many) == set(names(limited(items[::-1], max(a, b), seed)))
