"""Listing and splits: items are found whole, in order, under names of their own, which alone decide on their split."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from drawing import SPARSE, as_tensor, fake, fakes, names, picture, png, put, read, sparse_tar, tar_bytes, tar_of
from hypothesis import given, settings
from hypothesis import strategies as st
from sources_of_images import find_images

from codebook_tools.data.items import Item
from codebook_tools.data.splits import Splits, limited, split
from codebook_tools.errors import CodebookError


def test_a_folder_of_any_depth_is_read_whole_in_order_of_name(tmp_path: Path) -> None:
    pictures = {"b.png": picture(0), "a/z/deep.png": picture(1), "a/a.PNG": picture(2), "0.png": picture(3)}
    folder = tmp_path / ".cache"  # hidden, but named by the user
    for name, pixels in pictures.items():
        put(folder / name, pixels)
    (folder / "notes.txt").write_text("no image")
    (folder / "folder.png").mkdir()
    items = find_images([folder])
    assert names(items) == ["0.png", "a/a.PNG", "a/z/deep.png", "b.png"]
    assert torch.equal(read(items), as_tensor(*(pictures[item.name] for item in items)))


def test_a_tar_member_counts_under_its_normal_name_as_if_it_were_unpacked(tmp_path: Path) -> None:
    long = "d/" * 80 + "x.png"
    members = {"a.png": picture(0), long: picture(1), "./a.png": picture(2)}
    path = tar_of(tmp_path / "s.tar", {name: png(pixels) for name, pixels in members.items()} | {"a.json": b"{}"})
    items = find_images([path])
    assert names(items) == ["a.png", long]
    assert torch.equal(read(items), as_tensor(picture(2), picture(1)))


BRACES = {
    "s-{0000..0002}.tar": ["s-0000.tar", "s-0001.tar", "s-0002.tar"],
    "s-{8..11}.tar": ["s-8.tar", "s-9.tar", "s-10.tar", "s-11.tar"],
    "s-{11..8}.tar": ["s-8.tar", "s-9.tar", "s-10.tar", "s-11.tar"],
    "s-{8..011}.tar": ["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"],
    "s-{0..10}.tar": [f"s-{n}.tar" for n in range(11)],
    "{0..1}/s-{00..01}.tar": ["0/s-00.tar", "0/s-01.tar", "1/s-00.tar", "1/s-01.tar"],
}


@pytest.mark.parametrize("pattern", BRACES)
def test_braces_stand_for_their_range(pattern: str, tmp_path: Path) -> None:
    for i, file in enumerate(BRACES[pattern]):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        tar_of(tmp_path / file, {f"{i}.png": png(picture(i))})
    assert names(find_images([f"{tmp_path}/{pattern}"])) == sorted(f"{i}.png" for i in range(len(BRACES[pattern])))


def test_a_range_of_more_paths_than_there_could_be_is_refused(tmp_path: Path) -> None:
    for ranges in ("{0..99999999999}", "{0..1000}/{1000..0}", "{5..999999999999999999}"):
        with pytest.raises(CodebookError, match=r"stands for [\d,]+ paths, more than 1,000,000; give their folder"):
            find_images([f"{tmp_path}/{ranges}.jpg"])
    with pytest.raises(CodebookError, match=r"no such file or folder: .*/0\.jpg"):
        find_images([f"{tmp_path}/{{0..999999}}.jpg"])


NO_TAR = "is not a readable, uncompressed tar"


def test_what_is_no_image_source_is_the_users_error(tmp_path: Path) -> None:
    for name, content, message in (
        ("absent", None, "no such file or folder"),
        ("absent-{0..1}.tar", None, r"no such file or folder: .*absent-0\.tar"),
        ("x" * 300 + ".tar", None, "no such file or folder|File name too long"),
        ("notes.txt", b"text", "is no image source"),
        ("zipped.tar.gz", b"\x1f\x8b", "is no image source"),
        ("broken.tar", b"not a tar, but long enough to be looked at" * 30, NO_TAR),
        ("cut.tar", tar_bytes({"a.png": png(picture(0, (64, 64, 3)))})[:2000], NO_TAR),
        ("zipped.tar", gzip.compress(tar_bytes({"a.png": png(picture(0))})), NO_TAR),
        ("broken.npy", b"not an array", "is not a readable array file"),
        ("broken.npz", b"PK\x03\x04 but nothing after", "is not a readable array file"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(CodebookError, match=message):
            find_images([tmp_path / name])


def test_what_the_system_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(place: str, *_: object) -> object:
        raise PermissionError(13, "Permission denied", place)

    scan = os.scandir
    put(tmp_path / "d" / "closed" / "b.png", picture(0))
    monkeypatch.setattr(os, "scandir", lambda path: refuse(path) if str(path).endswith("closed") else scan(path))
    with pytest.raises(CodebookError, match=r"cannot list the folder .*closed: Permission denied"):
        find_images([tmp_path / "d"])
    path = tar_of(tmp_path / "s.tar", {"x.png": png(picture(0))})
    monkeypatch.setattr(tarfile, "open", refuse)
    with pytest.raises(CodebookError, match=rf"s\.tar {NO_TAR}: .*Permission denied"):
        find_images([path])


def test_names_that_several_paths_share_get_as_much_of_the_path_as_tells_them_apart(tmp_path: Path) -> None:
    for i, name in enumerate(("p/one/x.png", "q/one/x.png", "p/two/x.png", "p/two/y.png")):
        put(tmp_path / name, picture(i))
    items = find_images([tmp_path / "p" / "one", tmp_path / "p" / "two"])
    assert names(items) == ["one/x.png", "two/x.png", "y.png"]
    items = find_images([tmp_path / "p" / "one", tmp_path / "q" / "one"])
    assert names(items) == [f"{tmp_path}/{folder}/one/x.png" for folder in "pq"]
    assert torch.equal(read(items), as_tensor(picture(0), picture(1)))
    with pytest.raises(CodebookError, match=r"x\.png stands twice"):
        find_images([tmp_path / "p", tmp_path / "p"])


def test_links_are_followed_and_each_folder_is_read_once(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "x.png", picture(0))
    put(tmp_path / "d" / "sub" / "y.png", picture(1))
    for name, target in {"linked": "elsewhere", "sub/up": "d", "z.png": "elsewhere/x.png", "zz.png": "moved"}.items():
        (tmp_path / "d" / name).symlink_to(tmp_path / target)  # the second leads round in a circle
    os.mkfifo(tmp_path / "d" / "pipe.png")
    items = find_images([tmp_path / "d"])
    assert names(items) == ["linked/x.png", "sub/y.png", "z.png", "zz.png"]
    assert torch.equal(read(items[:3]), as_tensor(picture(0), picture(1), picture(0)))
    with pytest.raises(CodebookError, match=r"cannot read image zz\.png: No such file or directory; --skip-bad"):
        read(items)


def test_a_tar_of_links_holds_what_they_link_to(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    put(folder / "a" / "x.png", picture(0))
    os.link(folder / "a" / "x.png", folder / "a" / "y.png")  # which tar stores once, as a link
    for name, target in {"z.png": "a/x.png", "a/up.png": "../z.png", "gone.png": "../moved.png"}.items():
        (folder / name).symlink_to(target)
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.add(folder, ".")
        assert sum(member.isfile() for member in archive.getmembers()) == 1
    items = {item.name: item for item in find_images([tmp_path / "s.tar"])}
    assert list(items) == ["a/up.png", "a/x.png", "a/y.png", "gone.png", "z.png"]
    assert torch.equal(read([items[name] for name in ("a/x.png", "a/y.png", "z.png")]), as_tensor(*[picture(0)] * 3))
    with pytest.raises(CodebookError, match=r"cannot read image gone\.png: it is a link to \.\./moved\.png, which is"):
        read([items["gone.png"]])


@pytest.mark.parametrize("how", SPARSE)
def test_a_picture_that_a_tar_stores_sparse_is_named(tmp_path: Path, how: str) -> None:
    (tmp_path / "a.png").write_bytes(png(picture(0)) + bytes(300_000))
    whole = put(tmp_path / "b.png", picture(1))
    items = find_images([sparse_tar(tmp_path / "s.tar", tmp_path / "a.png", how, whole)])
    assert torch.equal(read(items[1:]), as_tensor(picture(1)))
    with pytest.raises(CodebookError, match=r"cannot read image a\.png: it is stored sparse; make the tar without"):
        read(items)


def test_names_need_be_neither_utf_8_nor_on_one_line(tmp_path: Path) -> None:
    for i in range(40):
        put(tmp_path / f"{i}.png", picture(i))
    for name, written in ((b"\xe4.png", r"\\udce4\.png"), (b"two\nlines.png", r"two\\nlines\.png")):
        path = Path(os.fsdecode(bytes(tmp_path) + b"/" + name))
        path.write_bytes(b"no picture")
        with pytest.raises(CodebookError, match=rf"^cannot read image {written}: "):
            read(find_images([path]))
    splits = split(find_images([tmp_path]))
    assert len(splits.calibration) + len(splits.test) == 42


COMMANDS = {
    "finetune": "--steps 1",
    "refit": "--k 4 --steps 0 --latents-cache cache --report page.html",
    "compare": "--k 12 --steps 1 --seeds 1 --strategies prune",
    "measure": "--stats stats.safetensors --report page.html",
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_take_names_that_are_no_utf_8(command: str, tiny: Path, images_folder: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"\xe9")
    shutil.copytree(images_folder, odd)
    shutil.copy(images_folder / "a" / "000.png", odd / "000\udce9.png")
    model = shutil.copy(tiny, tmp_path / "\udce9.safetensors")
    arguments = [command, str(model), "--data", str(odd), "--input-range", "-1,1", *COMMANDS[command].split()]
    result = subprocess.run(  # with the streams of a terminal: those of typer's runner take UTF-8 alone
        [sys.executable, "-m", "codebook_tools", *arguments], cwd=tmp_path, capture_output=True, check=False
    )
    assert result.returncode == 0, result
    page = tmp_path / "page.html"
    assert not page.exists() or r"\udce9.safetensors" in page.read_text(encoding="utf-8")


# --- splits and draws: by name alone, so that nothing leaks and nothing changes sides --------------------------------
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
