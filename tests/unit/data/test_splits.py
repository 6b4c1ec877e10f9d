"""Splits and draws: by name alone, so that nothing leaks and nothing changes sides."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawing import fake, fakes, names, picture, png, put, tar_of
from hypothesis import given
from hypothesis import strategies as st
from sources_of_images import find_images

from codebook_tools.data.splits import Splits, limited, split
from codebook_tools.errors import CodebookError


def sides(found: Splits) -> dict[str, str]:
    """Name -> the split it is in."""
    parts = {"train": found.train, "validation": found.validation, "test": found.test}
    return {item.name: part for part, items in parts.items() for item in items}


def test_splits_are_disjoint_whole_and_about_a_tenth_each() -> None:
    items = fakes(5000)
    found = split(items)
    assert sorted(sides(found)) == names(items)
    assert len(found.train) + len(found.validation) + len(found.test) == 5000
    # Binomial: 500 and 450 expected, four standard deviations are 85 and 81.
    assert abs(len(found.test) - 500) < 85 and abs(len(found.validation) - 450) < 81
    assert names(found.calibration) == sorted(names(found.train) + names(found.validation))


def test_the_side_of_an_item_is_told_by_the_sha256_of_its_name() -> None:
    for name, side in sides(split(fakes(300))).items():
        digest = hashlib.sha256(name.encode()).digest()
        test, validation = (int.from_bytes(digest[at : at + 8], "big") % 10 == 0 for at in (0, 8))
        assert side == ("test" if test else "validation" if validation else "train")


@given(st.sets(st.text("abc/", min_size=1, max_size=6), min_size=60, max_size=120), st.integers(0, 10**6))
def test_an_item_never_changes_sides_when_data_are_added_or_reordered(given_: set[str], seed: int) -> None:
    items = [fake(name) for name in given_]
    more = [*items, *fakes(200, "other/")]
    shuffled = [more[i] for i in np.random.default_rng(seed).permutation(len(more))]
    try:
        before = sides(split(items))
    except CodebookError:  # by chance without test data
        return
    after = sides(split(shuffled))
    assert all(after[name] == side for name, side in before.items())


def test_an_item_keeps_its_side_when_another_path_shares_its_name(tmp_path: Path) -> None:
    for i in range(60):
        put(tmp_path / "one" / f"{i}.png", picture(i, (2, 2)))
        put(tmp_path / "two" / f"{i}.png", picture(100 + i, (2, 2)))
    alone = sides(split(find_images([tmp_path / "one"])))
    both = sides(split(find_images([tmp_path / "one", tmp_path / "two"])))
    assert all(both[f"{folder}/{name}"] == side for name, side in alone.items() for folder in ("one", "two"))


def test_without_test_or_calibration_data_the_split_is_an_error() -> None:
    by_side = {side: [item for item in fakes(100) if item.in_tenth(0) == (side == "test")] for side in ("test", "data")}
    with pytest.raises(CodebookError, match="the test split of 2 images is empty"):
        split(by_side["data"][:2])
    with pytest.raises(CodebookError, match="the test split of 3 images is empty"):
        split(by_side["data"][:3], [])  # typed, and so an error
    with pytest.raises(CodebookError, match="the calibration split of 2 images is empty"):
        split(by_side["test"][:2])
    with pytest.raises(CodebookError, match="the test split"):
        split([])


@pytest.mark.parametrize("side", [True, False])
def test_a_tenth_of_few_items_is_one_of_them_whatever_their_names(side: bool) -> None:
    alike = [item for item in fakes(400) if item.in_tenth(0) == side]
    for count in (3, 4, 7):
        for start in range(0, 20, count):
            found = split(few := alike[start : start + count])
            assert len(found.test) == 1 and found.train and found.validation
            assert sorted(item.name for item in [*found.calibration, *found.test]) == sorted(item.name for item in few)
            assert split(few[::-1]).test == found.test


def test_few_groups_are_parted_whole() -> None:
    items = [replace(item, group=f"recording {i % 3}") for i, item in enumerate(fakes(30))]
    found = split(items)
    sides = [{item.kin for item in part} for part in (found.train, found.validation, found.test)]
    assert sum(map(len, sides)) == 3 and all(len(part) == 1 for part in sides)


def test_with_explicit_test_data_all_of_the_data_is_calibration_data() -> None:
    data, test = (
        [fake(f"{part}/{i}.png", bytes([i])) for i in range(n, m)] for part, n, m in (("a", 0, 200), ("b", 200, 230))
    )
    found = split(data, test)
    assert found.test == test
    assert names(found.calibration) == sorted(names(data))
    assert 0 < len(found.validation) < 50


@pytest.mark.parametrize("kind", ["folder", "tar", "npy"])
def test_a_test_item_that_is_in_the_data_byte_for_byte_is_refused_under_any_name(kind: str, tmp_path: Path) -> None:
    rows = picture(0, (20, 4, 4, 3))
    other = picture(1, (3, 4, 4, 3))
    other[1] = rows[17]
    files = {part: {f"{part}-{i}.png": png(row) for i, row in enumerate(r)} for part, r in (("d", rows), ("t", other))}
    sources = {}
    for part, array in (("d", rows), ("t", other)):
        path = tmp_path / (f"{part}.{kind}" if kind != "folder" else part)
        if kind == "npy":
            np.save(path, array)
        elif kind == "tar":
            tar_of(path, files[part])
        else:
            path.mkdir()
            for name, data in files[part].items():
                (path / name).write_bytes(data)
        sources[part] = find_images([path])
    with pytest.raises(CodebookError, match=r"test item t\S*1\S* is also in --data, as d\S*17"):
        split(sources["d"], sources["t"])
    without = [item for item in sources["t"] if "1" not in item.name]
    assert split(sources["d"], without).test == without


def test_empty_files_in_both_parts_are_not_taken_for_one_image(tmp_path: Path) -> None:
    for start, part in enumerate(("data", "test")):
        for i in range(20):
            put(tmp_path / part / f"{part}{i}.png", picture(100 * start + i))
        (tmp_path / part / f"empty-{part}.png").write_bytes(b"")
    data, test = find_images([tmp_path / "data"]), find_images([tmp_path / "test"])
    assert len(split(data, test).test) == 21


# --- limited ---------------------------------------------------------------------------------------------------------


def test_no_limit_or_a_wide_one_takes_all() -> None:
    items = fakes(20)
    for limit in (None, 20, 21, 10**9):
        assert limited(items, limit, 0) == items


def test_a_limit_draws_by_seed_and_keeps_the_order_of_names() -> None:
    items = fakes(300)
    one, again, other = (names(limited(items, 40, seed)) for seed in (0, 0, 1))
    assert len(one) == 40 and one == sorted(one) and one == again and one != other


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1, 2**63, 2**64 - 1])
def test_any_seed_draws(seed: int) -> None:
    assert len(limited(fakes(30), 7, seed)) == 7


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 9))
def test_a_smaller_limit_takes_part_of_what_a_larger_one_takes(a: int, b: int, seed: int) -> None:
    items = fakes(60)
    few, many = (set(names(limited(items, limit, seed))) for limit in sorted((a, b)))
    assert few <= many


def test_what_is_drawn_does_not_depend_on_the_order_given() -> None:
    items = fakes(100)
    assert names(limited(items[::-1], 30, 5)) == names(limited(items, 30, 5))


def test_every_item_is_drawn_alike() -> None:
    """400 draws of 10 out of 100: each is drawn 40 times, give or take four and a half standard deviations of 6."""
    items = fakes(100)
    times = dict.fromkeys(names(items), 0)
    for seed in range(400):
        for name in names(limited(items, 10, seed)):
            times[name] += 1
    assert min(times.values()) > 13 and max(times.values()) < 67
