"""Listing: folders, tars and files are found whole, in order, under names of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from drawing import SPARSE, as_tensor, names, picture, png, put, read, sparse_tar, tar_of
from PIL import Image
from places import SHARED
from sources_of_images import find_images

from codebook_tools.data.splits import split
from codebook_tools.errors import CodebookError

FASHION = SHARED / "data" / "fashion-test.tar"


def test_a_folder_of_any_depth_is_read_whole_in_order_of_name(tmp_path: Path) -> None:
    pictures = {"b.png": picture(0), "a/z/deep.png": picture(1), "a/a.PNG": picture(2), "0.png": picture(3)}
    for name, pixels in pictures.items():
        put(tmp_path / name, pixels)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    items = find_images([tmp_path])
    assert names(items) == ["0.png", "a/a.PNG", "a/z/deep.png", "b.png"]
    assert torch.equal(read(items), as_tensor(*(pictures[item.name] for item in items)))
    assert [item.source.nbytes for item in items] == [len(item.source.read()) for item in items]


def test_a_tar_holds_the_same_items_as_the_folder_it_was_made_of(images_folder: Path, images_tar: Path) -> None:
    loose, packed = find_images([images_folder]), find_images([images_tar])
    assert names(loose) == names(packed) and len(loose) == 60
    assert [item.source.nbytes for item in loose] == [item.source.nbytes for item in packed]
    assert [item.source.read() for item in loose] == [item.source.read() for item in packed]
    assert torch.equal(read(loose), read(packed))
    assert names(split(loose).test) == names(split(packed).test)


def test_a_tar_member_is_named_without_leading_dot_and_long_names_are_kept(tmp_path: Path) -> None:
    long = "d/" * 80 + "x.png"
    path = tar_of(tmp_path / "s.tar", {"./a.png": png(picture(0)), long: png(picture(1)), "a.json": b"{}"})
    assert names(find_images([path])) == ["a.png", long]


def test_of_a_name_that_a_tar_repeats_the_last_one_counts_as_it_does_when_unpacked(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "s.tar", {"a.png": png(picture(0)), "./a.png": png(picture(1))})
    items = find_images([path])
    assert names(items) == ["a.png"]
    assert torch.equal(read(items), as_tensor(picture(1)))


@pytest.mark.parametrize(
    ("given_", "files"),
    [
        ("s-{0000..0002}.tar", ["s-0000.tar", "s-0001.tar", "s-0002.tar"]),
        ("s-{8..11}.tar", ["s-8.tar", "s-9.tar", "s-10.tar", "s-11.tar"]),
        ("s-{11..8}.tar", ["s-8.tar", "s-9.tar", "s-10.tar", "s-11.tar"]),
        ("s-{8..011}.tar", ["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"]),
        ("s-{0..10}.tar", [f"s-{n}.tar" for n in range(11)]),
        ("{0..1}/s-{00..01}.tar", ["0/s-00.tar", "0/s-01.tar", "1/s-00.tar", "1/s-01.tar"]),
    ],
)
def test_braces_stand_for_their_range(given_: str, files: list[str], tmp_path: Path) -> None:
    for i, file in enumerate(files):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        tar_of(tmp_path / file, {f"{i}.png": png(picture(i))})
    assert names(find_images([f"{tmp_path}/{given_}"])) == sorted(f"{i}.png" for i in range(len(files)))


def test_a_missing_shard_of_a_range_is_named(tmp_path: Path) -> None:
    tar_of(tmp_path / "s-0.tar", {"a.png": png(picture(0))})
    with pytest.raises(CodebookError, match=r"no such file or folder: .*s-1\.tar"):
        find_images([f"{tmp_path}/s-{{0..1}}.tar"])


@pytest.mark.parametrize("ranges", ["{0..99999999999}", "{0..1000}/{1000..0}", "{5..999999999999999999}"])
def test_a_range_of_more_paths_than_there_could_be_is_refused(ranges: str, tmp_path: Path) -> None:
    with pytest.raises(CodebookError, match=r"stands for [\d,]+ paths, more than 1,000,000; give their folder"):
        find_images([f"{tmp_path}/{ranges}.jpg"])
    with pytest.raises(CodebookError, match=r"no such file or folder: .*/0\.jpg"):
        find_images([f"{tmp_path}/{{0..999999}}.jpg"])


def test_one_image_file_is_a_source_too(tmp_path: Path) -> None:
    items = find_images([put(tmp_path / "x.png", picture(5))])
    assert names(items) == ["x.png"]
    assert torch.equal(read(items), as_tensor(picture(5)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent", None, "no such file or folder"),
        ("notes.txt", b"text", "is no image source"),
        ("zipped.tar.gz", b"\x1f\x8b", "is no image source"),
        ("broken.tar", b"not a tar, but long enough to be looked at" * 30, "is not a readable, uncompressed tar"),
        ("empty.tar", b"", "is not a readable, uncompressed tar"),
        ("broken.npy", b"not an array", "is not a readable array file"),
        ("empty.npy", b"", "is not a readable array file"),
        ("broken.npz", b"PK\x03\x04 but nothing after", "is not a readable array file"),
    ],
)
def test_what_is_no_image_source_is_the_users_error(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CodebookError, match=message) as caught:
        find_images([tmp_path / name])
    assert name in str(caught.value)


def test_compressed_and_cut_off_tars_are_the_users_error(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as archive:
        archive.add(put(tmp_path / "x.png", picture(0)), "x.png")
    whole = tar_of(tmp_path / "whole.tar", {"a.png": png(picture(0, (64, 64, 3)))}).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:2000])
    for name in ("zipped.tar", "cut.tar"):
        with pytest.raises(CodebookError, match="is not a readable, uncompressed tar"):
            find_images([tmp_path / name])


@pytest.mark.parametrize("source", ["folder", "tar"])
def test_a_source_without_images_says_what_it_looked_for(source: str, tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "notes.txt").write_text("no image")
    if source == "tar":
        path = tar_of(tmp_path / "s.tar", {"notes.txt": b"no image"})
    with pytest.raises(CodebookError, match=r"no images in .*expected files ending in \.png"):
        find_images([path])


def test_names_that_several_paths_share_get_the_paths_own_in_front(tmp_path: Path) -> None:
    for folder, file in (("one", "x.png"), ("two", "x.png"), ("two", "y.png")):
        put(tmp_path / folder / file, picture(len(folder + file)))
    items = find_images([tmp_path / "one", tmp_path / "two"])
    assert names(items) == ["one/x.png", "two/x.png", "y.png"]


def test_paths_of_one_name_are_told_apart_by_all_of_the_path(tmp_path: Path) -> None:
    for i, folder in enumerate(("p/train", "q/train")):
        put(tmp_path / folder / "x.png", picture(i))
    items = find_images([tmp_path / "p" / "train", tmp_path / "q" / "train"])
    assert len(set(names(items))) == 2
    assert torch.equal(read(items), as_tensor(picture(0), picture(1)))


def test_a_path_given_twice_is_the_users_error(tmp_path: Path) -> None:
    put(tmp_path / "x.png", picture(0))
    with pytest.raises(CodebookError, match=r"x\.png stands twice"):
        find_images([tmp_path, tmp_path])


@pytest.mark.skipif(not FASHION.exists(), reason="../shared/data/fashion-test.tar is absent")
def test_a_tar_that_others_wrote_is_read_whole() -> None:
    items = find_images([FASHION])
    with tarfile.open(FASHION) as archive:
        members = sorted((m for m in archive if m.name.endswith(".png")), key=lambda m: m.name.removeprefix("./"))
        expected = [np.asarray(Image.open(archive.extractfile(m)).convert("L")) for m in members]  # type: ignore[arg-type]
    found = read(items, 1)
    assert len(items) == 100 and found.shape[1] == 1
    assert torch.equal(found[:, 0], torch.from_numpy(np.stack(expected)).float() / 255)


def test_what_is_hidden_is_no_data(tmp_path: Path) -> None:
    """macOS leaves ._x.jpg beside x.jpg on foreign disks and in tars; notebooks and desktops keep copies of images."""
    hidden = [
        "._x.png",
        "a/._y.png",
        ".DS_Store",
        ".ipynb_checkpoints/x.png",
        "__MACOSX/._x.png",
        "a/.thumbnails/y.png",
    ]
    for name in ["x.png", "a/y.png", *hidden]:
        put(tmp_path / "d" / name, picture(len(name)))
    tar_of(tmp_path / "s.tar", {f"./{name}": png(picture(len(name))) for name in ["x.png", "a/y.png", *hidden]})
    for source in ("d", "s.tar"):
        assert names(find_images([tmp_path / source])) == ["a/y.png", "x.png"]


def test_a_hidden_folder_that_is_given_is_read(tmp_path: Path) -> None:
    put(tmp_path / ".cache" / "x.png", picture(0))
    assert names(find_images([tmp_path / ".cache"])) == ["x.png"]


def test_links_are_followed_and_each_folder_is_read_once(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "x.png", picture(0))
    put(tmp_path / "d" / "sub" / "y.png", picture(1))
    (tmp_path / "d" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d" / "sub" / "up").symlink_to(tmp_path / "d")  # a circle
    (tmp_path / "d" / "z.png").symlink_to(tmp_path / "elsewhere" / "x.png")
    items = find_images([tmp_path / "d"])
    assert names(items) == ["linked/x.png", "sub/y.png", "z.png"]
    assert torch.equal(read(items), as_tensor(picture(0), picture(1), picture(0)))


def test_a_link_to_nothing_is_named_and_a_pipe_is_no_image(tmp_path: Path) -> None:
    put(tmp_path / "a.png", picture(0))
    (tmp_path / "gone.png").symlink_to(tmp_path / "moved.png")
    os.mkfifo(tmp_path / "pipe.png")
    items = find_images([tmp_path])
    assert names(items) == ["a.png", "gone.png"]
    with pytest.raises(CodebookError, match=r"cannot read image gone\.png: No such file or directory; --skip-bad"):
        read(items)


def test_a_tar_of_links_holds_what_they_link_to(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    put(folder / "a" / "x.png", picture(0))
    os.link(folder / "a" / "x.png", folder / "a" / "y.png")  # which tar stores once, as a link
    (folder / "z.png").symlink_to("a/x.png")
    (folder / "a" / "up.png").symlink_to("../z.png")
    (folder / "gone.png").symlink_to("../moved.png")
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
    for name in (b"\xe4.png", b"two\nlines.png"):
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_bytes(b"no picture")
    for i in range(40):
        put(tmp_path / f"{i}.png", picture(i))
    items = find_images([tmp_path])
    assert len(split(items).calibration) + len(split(items).test) == 42
    with pytest.raises(CodebookError, match=r"^cannot read image two\\nlines\.png: "):
        read([item for item in items if "two" in item.name])
    with pytest.raises(CodebookError, match=r"^cannot read image \\udce4\.png: "):
        read([item for item in items if "\udce4" in item.name])


def test_a_thousand_files_are_found_at_once_in_an_order_of_their_own(tmp_path: Path) -> None:
    data = png(picture(0, (2, 2, 3)))
    written = [f"{i:04d}.png" for i in np.random.default_rng(0).permutation(1000)]
    for name in written:
        (tmp_path / name).write_bytes(data)
    start = time.perf_counter()
    items = find_images([tmp_path])
    pixels = read(items)
    assert time.perf_counter() - start < 5
    assert names(items) == sorted(written) and len(pixels) == 1000


def test_shards_are_listed_by_braces_and_by_repetition_and_may_share_names(tmp_path: Path) -> None:
    for shard in range(12):
        members = {f"./{i}.png": png(picture(100 * shard + i)) for i in range(5)}
        tar_of(tmp_path / f"{shard:03d}.tar", members)
    items = find_images([tmp_path / "{000..009}.tar", tmp_path / "010.tar", tmp_path / "011.tar"])
    assert names(items) == [f"{shard:03d}.tar/{i}.png" for shard in range(12) for i in range(5)]
    assert torch.equal(read(items), as_tensor(*(picture(100 * shard + i) for shard in range(12) for i in range(5))))
    few = find_images([tmp_path / "{000..001}.tar"])
    assert [item.source.read() for item in few] == [item.source.read() for item in items[:10]]


def test_a_tar_that_the_system_refuses_is_the_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tar_of(tmp_path / "s.tar", {"x.png": png(picture(0))})
    monkeypatch.setattr(tarfile, "open", refuse)
    with pytest.raises(CodebookError, match=r"s\.tar is not a readable, uncompressed tar: .*Permission denied"):
        find_images([path])


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a.png", picture(0))
    put(tmp_path / "closed" / "b.png", picture(0))
    listed = os.scandir

    def refuse(folder: str) -> object:
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", folder)
        return listed(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(CodebookError, match=r"cannot list the folder .*closed: Permission denied"):
        find_images([tmp_path])


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".tar", "x.png/y.png"])
def test_a_path_that_cannot_be_is_the_users_error(name: str, tmp_path: Path) -> None:
    put(tmp_path / "x.png", picture(0))
    with pytest.raises(CodebookError, match=r"no such file or folder|File name too long"):
        find_images([tmp_path / name])


@pytest.mark.parametrize(
    "command",
    [
        ("finetune", "--steps", 1),
        ("refit", "--k", 4, "--steps", 0, "--latents-cache", "cache", "--report", "page.html"),
        ("compare", "--k", 12, "--steps", 1, "--seeds", 1, "--strategies", "prune"),
        ("measure", "--stats", "stats.safetensors", "--report", "page.html"),
    ],
    ids=lambda command: command[0],
)
def test_every_command_takes_names_that_are_no_utf_8(
    command: tuple[object, ...], tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    odd = tmp_path / os.fsdecode(b"\xe9")
    shutil.copytree(images_folder, odd)
    shutil.copy(images_folder / "a" / "000.png", odd / "000\udce9.png")
    model = shutil.copy(tiny, tmp_path / "\udce9.safetensors")
    asked = [command[0], model, "--data", odd, "--input-range", "-1,1", *command[1:]]
    found = subprocess.run(  # with the streams of a terminal: those of typer's runner take UTF-8 alone
        [sys.executable, "-m", "codebook_tools", *map(str, asked)], cwd=tmp_path, capture_output=True, check=False
    )
    assert found.returncode == 0, found
    page = tmp_path / "page.html"
    assert not page.exists() or r"\udce9.safetensors" in page.read_text(encoding="utf-8")
