"""Images: every kind of source read whole, twice, and split so that nothing leaks."""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
import tarfile
import time
import warnings
import zlib
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from conftest import Outcome
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from codebook_tools import media as media_module
from codebook_tools.errors import CodebookError
from codebook_tools.images import Images, array_items, find_images, sample_images, sample_photographs
from codebook_tools.items import Item
from codebook_tools.sources import Source
from codebook_tools.splits import Splits, limited, split

Pixels = NDArray[np.uint8]
SHARED = Path(__file__).parents[1] / ".." / "shared"
FASHION = SHARED / "data" / "fashion-test.tar"


def picture(seed: int, shape: tuple[int, ...] = (8, 8, 3)) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def saved(picture: Image.Image, kind: str, **how: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **how)
    return file.getvalue()


def png_of(colour: int, bits: int, rows: list[list[int]], **chunks: bytes) -> bytes:
    """A PNG written by hand. colour: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA. bits: 8 or 16."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    width = len(rows[0]) // {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    header = struct.pack(">2I5B", width, len(rows), bits, colour, 0, 0, 0)
    data = b"".join(b"\0" + struct.pack(f">{len(row)}{'BH'[bits == 16]}", *row) for row in rows)
    more = b"".join(chunk(kind.encode(), content) for kind, content in chunks.items())
    body = chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff_of(
    data: bytes, width: int, bits: int, photometric: int, samples: int = 1, order: str = "<", **more: int
) -> bytes:
    """A TIFF of one row written by hand. photometric: 0 white at zero, 1 black at zero, 2 RGB, 5 CMYK, 6 YCbCr, 8 LAB.

    order: < or >, for its bytes. more: compression, orientation, extra (what the last sample is), format.
    """
    tags: dict[int, list[int]] = {
        256: [width], 257: [1], 258: [bits] * samples, 259: [more.get("compression", 1)], 262: [photometric],
        273: [0], 274: [more.get("orientation", 1)], 277: [samples], 278: [1], 279: [len(data)],
        339: [more.get("format", 1)] * samples,
    } | ({338: [more["extra"]]} if "extra" in more else {})  # fmt: skip
    start = 8 + 2 + 12 * len(tags) + 4
    lists = sum(2 * len(values) for values in tags.values() if len(values) > 2)
    tags[273] = [start + lists]
    entries, tail = b"", b""
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}H", *values)
        if len(packed) > 4:
            packed, tail = struct.pack(f"{order}I", start + len(tail)), tail + packed
        entries += struct.pack(f"{order}2HI", tag, 3, len(values)) + packed.ljust(4, b"\0")
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(tags))
    return head + entries + bytes(4) + tail + data


def put(path: Path, pixels: Pixels) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(pixels))
    return path


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def read(items: list[Item], channels: int = 3, **settings: object) -> Tensor:
    """All of the items' pixels, (n, channels, height, width)."""
    return Images(items, channels, **settings).load(items)[1]  # type: ignore[arg-type]


def as_tensor(*pictures: Pixels) -> Tensor:
    return torch.stack([torch.tensor(pixels).movedim(-1, 0).float() / 255 for pixels in pictures])


def names(items: list[Item]) -> list[str]:
    return [item.name for item in items]


# --- folders and tars ----------------------------------------------------------------------------------------------


def test_a_folder_of_any_depth_is_read_whole_in_order_of_name(tmp_path: Path) -> None:
    pictures = {"b.png": picture(0), "a/z/deep.png": picture(1), "a/a.PNG": picture(2), "0.png": picture(3)}
    for name, pixels in pictures.items():
        put(tmp_path / name, pixels)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    items = find_images([tmp_path])
    assert names(items) == ["0.png", "a/a.PNG", "a/z/deep.png", "b.png"]
    assert torch.equal(read(items), as_tensor(*(pictures[item.name] for item in items)))
    assert [item.nbytes for item in items] == [len(item.read()) for item in items]


def test_a_tar_holds_the_same_items_as_the_folder_it_was_made_of(images_folder: Path, images_tar: Path) -> None:
    loose, packed = find_images([images_folder]), find_images([images_tar])
    assert names(loose) == names(packed) and len(loose) == 60
    assert [item.nbytes for item in loose] == [item.nbytes for item in packed]
    assert [item.read() for item in loose] == [item.read() for item in packed]
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
    assert [item.read() for item in few] == [item.read() for item in items[:10]]


def test_a_tar_that_the_system_refuses_is_the_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tar_of(tmp_path / "s.tar", {"x.png": png(picture(0))})
    monkeypatch.setattr(tarfile, "open", refuse)
    with pytest.raises(CodebookError, match=r"s\.tar is not a readable, uncompressed tar: .*Permission denied"):
        find_images([path])


# --- arrays --------------------------------------------------------------------------------------------------------

RGB, GREY = picture(0, (5, 6, 7, 3)), picture(1, (5, 6, 7))
LAYOUTS: dict[str, tuple[NDArray[np.generic], Pixels]] = {
    "n,h,w,3": (RGB, RGB),
    "n,3,h,w": (RGB.transpose(0, 3, 1, 2), RGB),
    "n,h,w": (GREY, np.repeat(GREY[..., None], 3, axis=3)),
    "n,h,w,1": (GREY[..., None], np.repeat(GREY[..., None], 3, axis=3)),
    "n,1,h,w": (GREY[:, None], np.repeat(GREY[..., None], 3, axis=3)),
    "fortran order": (np.asfortranarray(RGB), RGB),
    "float32": ((RGB / 255).astype(np.float32), RGB),
    "float64, channels first": (RGB.transpose(0, 3, 1, 2) / 255, RGB),
    "float16": ((RGB / 255).astype(np.float16), RGB),
    "big-endian": ((RGB / 255).astype(">f4"), RGB),
}


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_of_every_layout_give_the_same_pixels(layout: str, suffix: str, tmp_path: Path) -> None:
    array, expected = LAYOUTS[layout]
    path = tmp_path / f"x{suffix}"
    np.save(path, array) if suffix == ".npy" else np.savez_compressed(path, anything=array)
    items = find_images([path])
    assert names(items) == [f"x{suffix}#{i}" for i in range(5)]
    assert torch.equal(read(items), as_tensor(*expected))


def test_grey_from_colour_is_the_luma_of_pillow_and_colour_from_grey_repeats_it(tmp_path: Path) -> None:
    np.save(tmp_path / "rgb.npy", RGB)
    np.save(tmp_path / "grey.npy", GREY)
    luma = np.stack([np.asarray(Image.fromarray(row).convert("L")) for row in RGB])
    assert torch.equal(read(find_images([tmp_path / "rgb.npy"]), 1)[:, 0], torch.from_numpy(luma).float() / 255)
    assert torch.equal(read(find_images([tmp_path / "grey.npy"]), 1)[:, 0], torch.from_numpy(GREY).float() / 255)


def test_rows_past_ten_are_in_a_fixed_order_and_hold_their_own_pixels(tmp_path: Path) -> None:
    rows = picture(3, (25, 4, 4))
    np.save(tmp_path / "x.npy", rows)
    items = find_images([tmp_path / "x.npy"])
    assert names(items) == sorted(names(items)) and len(items) == 25
    order = [int(item.name.partition("#")[2]) for item in items]
    assert torch.equal(read(items, 1)[:, 0], torch.from_numpy(rows[order]).float() / 255)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 4)), r"shape \(3, 4\): expected"),
        (np.zeros((3, 4, 5, 2)), r"shape \(3, 4, 5, 2\): expected"),
        (np.zeros((2, 3, 4, 5, 3)), "expected"),
        (np.zeros((3, 4, 5), dtype=np.int64), "dtype int64"),
        (np.zeros((3, 4, 5), dtype=bool), "dtype bool"),
        (np.array([{"a": 1}], dtype=object), "is not a readable array file"),
    ],
)
def test_arrays_that_are_no_images_say_why(array: NDArray[np.generic], message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(CodebookError, match=message):
        find_images([tmp_path / "x.npy"])


def test_an_npz_of_two_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=GREY, b=GREY)
    with pytest.raises(CodebookError, match="holds 2 arrays"):
        find_images([tmp_path / "x.npz"])


def test_an_npz_damaged_inside_is_the_users_error(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=GREY)
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[80:120] = bytes(40)
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(CodebookError, match="is not a readable array file"):
        find_images([tmp_path / "x.npz"])


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
def test_floating_point_pixels_outside_zero_and_one_are_unreadable(value: float) -> None:
    rows = np.full((2, 4, 4), 0.5)
    rows[1, 2, 2] = value
    with pytest.raises(CodebookError, match=r"cannot read image x#1: .*\[0, 1\]; --skip-bad"):
        read(array_items("x", rows), 1)


# --- decoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "bands"), [("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4), ("CMYK", 4), ("P", 1), ("1", 1)]
)
def test_pictures_of_every_common_mode_become_rgb_or_grey(mode: str, bands: int, tmp_path: Path) -> None:
    source = Image.fromarray(picture(0, (6, 9, 3))).convert(mode)
    assert len(source.getbands()) == bands
    path = tmp_path / "x.tiff"
    source.save(path)
    for channels, target in ((3, "RGB"), (1, "L")):
        expected = np.asarray(source.convert(target)).reshape(6, 9, channels)
        assert torch.equal(read(find_images([path]), channels), as_tensor(expected))


COLOURS = [[200, 100, 50], [10, 20, 30]]
"""What every picture of IN_COLOUR shows, its second pixel often hidden by alpha. Their luma is 124.2 and 18.15."""

FOUR = [200, 100, 50, 255, 10, 20, 30, 0]
THREE = [200, 100, 50, 10, 20, 30]
PALETTE = bytes(THREE)
CMYK = bytes([55, 155, 205, 0, 245, 235, 225, 0])
RGBA_IMAGE = Image.fromarray(np.array(FOUR, dtype=np.uint8).reshape(1, 2, 4))
RGB_IMAGE = Image.fromarray(np.array([COLOURS], dtype=np.uint8))


def words(values: list[int], order: str) -> bytes:
    """16 bits that stand for 8."""
    return struct.pack(f"{order}{len(values)}H", *(257 * value for value in values))


IN_COLOUR = {
    "RGB": png_of(2, 8, [THREE]),
    "RGBA": png_of(6, 8, [FOUR]),
    "RGB with one colour transparent": png_of(2, 8, [THREE], tRNS=struct.pack(">3H", 10, 20, 30)),
    "palette": png_of(3, 8, [[0, 1]], PLTE=PALETTE),
    "palette with a transparent colour": png_of(3, 8, [[0, 1]], PLTE=PALETTE, tRNS=bytes([255, 0])),
    "palette with alpha": png_of(3, 8, [[0, 1]], PLTE=PALETTE, tRNS=bytes([200, 128])),
    "RGB of 16 bits": png_of(2, 16, [[257 * value for value in THREE]]),
    "RGBA of 16 bits": png_of(6, 16, [[257 * value for value in FOUR]]),
    "lossless webp": saved(RGB_IMAGE, "WEBP", lossless=True),
    "lossless webp with alpha": saved(RGBA_IMAGE, "WEBP", lossless=True, exact=True),
    "bmp": saved(RGB_IMAGE, "BMP"),
    "bmp with alpha": saved(RGBA_IMAGE, "BMP"),
    "tiff with alpha": tiff_of(bytes(FOUR), 2, 8, 2, 4, extra=2),
    "lzw tiff": saved(RGB_IMAGE, "TIFF", compression="tiff_lzw"),
    "tiff of 16 bits, little-endian": tiff_of(words(THREE, "<"), 2, 16, 2, 3),
    "tiff of 16 bits, big-endian": tiff_of(words(THREE, ">"), 2, 16, 2, 3, ">"),
    "CMYK tiff": tiff_of(CMYK, 2, 8, 5, 4),
}


@pytest.mark.parametrize("kind", IN_COLOUR)
def test_colours_are_those_stored_whatever_their_alpha(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(IN_COLOUR[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        items = find_images([tmp_path])
        assert (read(items)[0, :, 0].T * 255).round().tolist() == COLOURS
        assert (read(items, 1)[0, 0, 0] * 255).round().tolist() == [124, 18]


DEFLATED = {order: zlib.compress(words([200, 10], order)) for order in "<>"}
IN_GREY = {
    "grey": png_of(0, 8, [[200, 10]]),
    "with alpha": png_of(4, 8, [[200, 255, 10, 0]]),
    "with one grey transparent": png_of(0, 8, [[200, 10]], tRNS=struct.pack(">H", 10)),
    "16 bits": png_of(0, 16, [[257 * 200, 257 * 10]]),
    "16 bits, one transparent": png_of(0, 16, [[257 * 200, 257 * 10]], tRNS=struct.pack(">H", 2570)),
    "16 bits with alpha": png_of(4, 16, [[257 * 200, 65535, 257 * 10, 0]]),
    "tiff of 16 bits, little-endian": tiff_of(words([200, 10], "<"), 2, 16, 1),
    "tiff of 16 bits, big-endian": tiff_of(words([200, 10], ">"), 2, 16, 1, order=">"),
    "deflated tiff of 16 bits": tiff_of(DEFLATED["<"], 2, 16, 1, compression=8),
    "deflated tiff of 16 bits, big-endian": tiff_of(DEFLATED[">"], 2, 16, 1, order=">", compression=8),
    "tiff of 16 bits, white at zero": tiff_of(words([55, 245], "<"), 2, 16, 0),
    "tiff of 8 bits, white at zero": tiff_of(bytes([55, 245]), 2, 8, 0),
    "tiff of 12 bits: 3212 and 161 of 4095": tiff_of(bytes([0xC8, 0xC0, 0xA1]), 2, 12, 1),
    "tiff with alpha": tiff_of(bytes([200, 255, 10, 0]), 2, 8, 1, 2, extra=2),
    "tiff multiplied by alpha: 6 of 153 is 10 of 255": tiff_of(bytes([200, 255, 6, 153]), 2, 8, 1, 2, extra=1),
}  # fmt: skip


@pytest.mark.parametrize("kind", IN_GREY)
def test_greys_are_those_stored_whatever_their_depth_and_alpha(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(IN_GREY[kind])
    for channels in (1, 3):
        found = read(find_images([tmp_path]), channels)[0, :, 0] * 255
        assert found.round().tolist() == [[200, 10]] * channels, channels


def test_one_bit_is_black_or_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False, True]])).save(tmp_path / "x.png")
    assert read(find_images([tmp_path]), 1).flatten().tolist() == [1, 0, 1]


@pytest.mark.parametrize(("kind", "within"), [("TIFF", 0), ("JPEG", 3)])
def test_cmyk_is_multiplied_out_and_inverted_in_jpegs_as_adobe_does(kind: str, within: int, tmp_path: Path) -> None:
    """A key of 128 leaves 127 of 255: without cyan 127, with 128 of magenta 127 * 127 / 255 = 63, with all yellow 0."""
    data = saved(Image.new("CMYK", (16, 16), (0, 128, 255, 128)), kind, **({"quality": 100} if within else {}))
    assert kind == "TIFF" or b"Adobe" in data
    (tmp_path / "x.jpg").write_bytes(data)
    found = read(find_images([tmp_path]))[0, :, 8, 8] * 255
    assert float((found - torch.tensor([127, 63, 0])).abs().max()) <= within


@pytest.mark.parametrize("how", [{}, {"subsampling": 2}, {"keep_rgb": True}, {"progressive": True}])
def test_jpegs_show_their_colour_whatever_space_they_store(how: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(saved(Image.new("RGB", (16, 16), (200, 100, 50)), "JPEG", quality=95, **how))
    found = read(find_images([tmp_path]))[0, :, 8, 8] * 255
    assert float((found - torch.tensor([200, 100, 50])).abs().max()) <= 3


def test_tiffs_of_other_colour_spaces_are_converted(tmp_path: Path) -> None:
    """Red in YCbCr; white and the middle grey of LAB, whose lightness 127 / 2.55 is 118 in sRGB."""
    (tmp_path / "x.tif").write_bytes(tiff_of(bytes([76, 85, 255]), 1, 8, 6, 3))
    found = read(find_images([tmp_path]))[0, :, 0, 0] * 255
    assert float((found - torch.tensor([255, 0, 0])).abs().max()) <= 2
    (tmp_path / "x.tif").write_bytes(tiff_of(bytes([255, 0, 0, 127, 0, 0]), 2, 8, 8, 3))
    for channels in (1, 3):
        found = read(find_images([tmp_path]), channels)[0, :, 0] * 255
        assert float((found - torch.tensor([255.0, 118.0])).abs().max()) <= 2


@pytest.mark.parametrize(
    ("kind", "how"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("GIF", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})],
)
def test_of_several_frames_or_pages_the_first_counts(kind: str, how: dict[str, object], tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "lime", "blue")]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **how)
    with Image.open(io.BytesIO(data)) as several:
        assert several.n_frames == 3
    (tmp_path / "x.webp").write_bytes(data)
    assert torch.equal(read(find_images([tmp_path])), torch.tensor([1.0, 0, 0]).reshape(1, 3, 1, 1).expand(1, 3, 3, 4))


@pytest.mark.parametrize(
    ("kind", "how"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("JPEG", {"quality": 95, "subsampling": 0})],
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_stands_upright_as_its_exif_says(
    orientation: int, kind: str, how: dict[str, object], tmp_path: Path
) -> None:
    upright = picture(1, (2, 3, 3)).repeat(8, axis=0).repeat(8, axis=1)  # JPEG keeps blocks of one colour
    undone = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1]}
    # Of 5 to 8 the stored rows are columns of what was seen: row 0 its left side or (6, 7) right, column 0 its top or
    # (7, 8) bottom.
    seen = {5: upright, 6: upright[:, ::-1], 7: upright[::-1, ::-1], 8: upright[::-1]}
    undone |= {number: turned.transpose(1, 0, 2) for number, turned in seen.items()}
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undone[orientation]))
    (tmp_path / "x.png").write_bytes(saved(stored, kind, exif=exif, **how))
    found = read(find_images([tmp_path]))
    assert found.shape == (1, 3, 16, 24)
    assert float((found - as_tensor(upright)).abs().max()) <= (4 / 255 if kind == "JPEG" else 0)


def test_sixteen_bits_are_turned_upright_too(tmp_path: Path) -> None:
    (tmp_path / "x.tif").write_bytes(tiff_of(words([1, 2, 3], ">"), 3, 16, 1, order=">", orientation=3))
    assert (read(find_images([tmp_path]), 1) * 255).round().flatten().tolist() == [3, 2, 1]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_exif_leaves_a_whole_picture_as_it_is(kind: str, tmp_path: Path) -> None:
    source = Image.fromarray(picture(3, (8, 9, 3)))
    whole, odd = saved(source, kind), saved(source, kind, exif=b"Exif\0\0nothing of the kind")
    assert whole != odd
    for name, data in (("whole", whole), ("odd", odd)):
        (tmp_path / f"{name}.jpg").write_bytes(data)
    found = read(find_images([tmp_path]))
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_not_clipped(suffix: str, channels: int, tmp_path: Path) -> None:
    values = np.array([[0, 128, 257, 2570], [32896, 51400, 65278, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    found = read(find_images([tmp_path]), channels)
    assert (found[0, 0] * 255).round().flatten().tolist() == [0, 0, 1, 10, 128, 200, 254, 255]


@pytest.mark.parametrize(
    "data",
    [
        tiff_of(struct.pack("<f", 0.5), 1, 32, 1, format=3),
        tiff_of(struct.pack("<I", 7), 1, 32, 1),
        tiff_of(struct.pack("<i", -7), 1, 32, 1, format=2),
        tiff_of(struct.pack("<h", -7), 1, 16, 1, format=2),
    ],
    ids=["floating point", "32 bits", "32 bits, signed", "16 bits, signed"],
)
def test_pictures_without_a_fixed_range_are_unreadable_not_guessed(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.tiff").write_bytes(data)
    with pytest.raises(CodebookError, match="no fixed range"):
        read(find_images([tmp_path]), 1)


@pytest.mark.parametrize("suffix", ["jpg", "webp", "bmp", "tif"])
def test_formats_by_suffix_are_decoded_as_pillow_does(suffix: str, tmp_path: Path) -> None:
    Image.fromarray(picture(2, (10, 12, 3))).save(tmp_path / f"x.{suffix}")
    expected = np.asarray(Image.open(tmp_path / f"x.{suffix}").convert("RGB"))
    assert torch.equal(read(find_images([tmp_path])), as_tensor(expected))


@pytest.mark.parametrize("name", ["x.JPG", "x.Jpeg", "x.TIF", "x.TIFF", "x.WebP", "x.BMP", "x.PNG", "x.png"])
def test_what_is_in_a_file_counts_not_its_name(name: str, tmp_path: Path) -> None:
    for kind in ("PNG", "BMP", "TIFF", "GIF"):
        (tmp_path / name).write_bytes(saved(Image.new("RGB", (2, 2), "red"), kind))
        assert read(find_images([tmp_path])).flatten(2).mean(2).tolist() == [[1, 0, 0]]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1)])
def test_the_smallest_pictures_are_read(height: int, width: int, tmp_path: Path) -> None:
    pixels = picture(4, (height, width, 3))
    put(tmp_path / "x.png", pixels)
    assert torch.equal(read(find_images([tmp_path])), as_tensor(pixels))


# --- unreadable images ---------------------------------------------------------------------------------------------

NOISE = Image.fromarray(picture(9, (64, 64, 3)))
BAD = {
    "nothing": (b"", "the file is empty"),
    "text": (b"<html>404</html>", "no PNG, JPEG, WebP, BMP or TIFF picture"),
    "a program for Ghostscript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "no PNG, JPEG, WebP, BMP or TIFF",
    ),
    "too many samples": (tiff_of(bytes(9), 1, 8, 1, 9), "a rare kind"),
    **{f"half a {kind}": (saved(NOISE, kind)[:1500], "damaged") for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF")},
    **{f"a bit of a {kind}": (saved(NOISE, kind)[:30], "damaged") for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF")},
    "noughts within a PNG": (saved(NOISE, "PNG")[:500] + bytes(99) + saved(NOISE, "PNG")[599:], "damaged"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named_with_its_reason_on_one_line(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, reason = BAD[kind]
    put(tmp_path / "a.png", picture(0, (8, 8, 3)))
    (tmp_path / "b.png").write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CodebookError, match=rf"^cannot read image b\.png: .*{reason}.*--skip-bad") as caught:
            read(find_images([tmp_path]))
        assert "\n" not in str(caught.value) and " at 0x" not in str(caught.value)
        source = Images(find_images([tmp_path]), 3, skip_bad=True)
        assert len(source.load(source.items)[0]) == 1
        assert list(source.bad) == ["b.png"] and reason in source.bad["b.png"]
    assert capfd.readouterr() == ("", "")


def test_large_pictures_are_read_in_silence_and_larger_ones_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow warns beyond its limit and refuses beyond twice that."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    put(tmp_path / "a.png", picture(0, (8, 8, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read(find_images([tmp_path]))) == 1
    put(tmp_path / "b.png", picture(0, (16, 16, 3)))
    with pytest.raises(CodebookError, match=r"b\.png: too many pixels: .*256 pixels.* exceeds limit of 100"):
        read(find_images([tmp_path]), size=8)


def test_a_few_bytes_that_claim_to_be_billions_of_pixels_are_named_as_that(tmp_path: Path) -> None:
    small = png_of(0, 8, [[0]])
    header = b"IHDR" + struct.pack(">2I5B", 60_000, 60_000, 8, 0, 0, 0, 0)
    (tmp_path / "b.png").write_bytes(small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:])
    with pytest.raises(CodebookError, match=r"cannot read image b\.png: too many pixels: .*3600000000"):
        read(find_images([tmp_path]))


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied", "/a/b.png"), OSError(5, "Input/output error")]
)
def test_a_file_that_the_system_refuses_is_named_with_its_reason(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "a.png", picture(0))
    items = find_images([put(tmp_path / "b.png", picture(1))])

    def refuse() -> BinaryIO:
        raise error

    object.__setattr__(items[0].source, "open", refuse)
    with pytest.raises(CodebookError, match=rf"cannot read image b\.png: {error.strerror}; --skip-bad"):
        read(items)
    assert split(fakes(50), items).test == items  # whether it is also in the data, nobody can tell


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


def test_empty_files_in_both_parts_are_not_taken_for_one_image(tmp_path: Path) -> None:
    for start, part in enumerate(("data", "test")):
        for i in range(20):
            put(tmp_path / part / f"{part}{i}.png", picture(100 * start + i))
        (tmp_path / part / f"empty-{part}.png").write_bytes(b"")
    data, test = find_images([tmp_path / "data"]), find_images([tmp_path / "test"])
    assert len(split(data, test).test) == 21


@pytest.fixture
def one_bad(tmp_path: Path) -> Path:
    """Six images, of which c.png is cut off."""
    for i, name in enumerate("abcdef"):
        put(tmp_path / f"{name}.png", picture(i, (32, 32, 3)))
    (tmp_path / "c.png").write_bytes((tmp_path / "c.png").read_bytes()[:700])
    return tmp_path


def test_an_unreadable_image_is_named_with_the_way_out(one_bad: Path) -> None:
    source = Images(find_images([one_bad]), 3)
    with pytest.raises(CodebookError, match=r"cannot read image c\.png: .*--skip-bad"):
        list(source.batches(2))


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_with_skip_bad_the_others_are_read_and_the_bad_one_is_noted_once(one_bad: Path, batch: int) -> None:
    source = Images(find_images([one_bad]), 3, skip_bad=True)
    for _ in range(2):
        read_names = [item.name for items, _ in source.batches(batch) for item in items]
        assert read_names == ["a.png", "b.png", "d.png", "e.png", "f.png"]
        assert list(source.bad) == ["c.png"]
    pixels = torch.cat([pixels for _, pixels in source.batches(batch)])
    assert torch.equal(pixels, as_tensor(*(picture(i, (32, 32, 3)) for i in (0, 1, 3, 4, 5))))


def test_when_every_image_is_unreadable_skip_bad_is_an_error(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"no image")
    with pytest.raises(CodebookError, match="none of the 2 images can be read"):
        list(Images(find_images([tmp_path]), 3, skip_bad=True).batches(10))


def test_bad_images_of_one_subset_do_not_condemn_another(tmp_path: Path) -> None:
    for i, name in enumerate("abcdef"):
        put(tmp_path / f"{name}.png", picture(i))
    for name in "abd":
        (tmp_path / f"{name}.png").write_bytes(b"no image")
    items = find_images([tmp_path])
    source = Images(items, 3, skip_bad=True)
    assert [len(found) for found, _ in source.subset(items[:3]).batches(10)] == [1]
    assert names(source.subset(items[3:5]).load(items[3:5])[0]) == ["e.png"]
    assert list(source.bad) == ["a.png", "b.png", "d.png"]


def test_a_file_that_vanished_after_listing_is_unreadable(tmp_path: Path) -> None:
    put(tmp_path / "a.png", picture(0))
    put(tmp_path / "b.png", picture(1))
    items = find_images([tmp_path])
    (tmp_path / "a.png").unlink()
    with pytest.raises(CodebookError, match=r"cannot read image a\.png"):
        read(items)
    assert len(read(items, skip_bad=True)) == 1


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("text.png", b"hello", "no PNG, JPEG, WebP, BMP or TIFF picture"),
        ("empty.jpg", b"", "the file is empty"),
        ("cut.webp", BAD["half a WEBP"][0], "damaged"),
        ("wide.png", png(picture(0, (16, 24, 3))), "24x16, .* 16x16; give --size"),
        ("float.tiff", tiff_of(struct.pack("<f", 0.5), 1, 32, 1, format=3), "no fixed range"),
    ],
)
def test_the_command_says_which_item_failed_and_why_and_writes_nothing(
    name: str,
    data: bytes,
    reason: str,
    tiny: Path,
    images_folder: Path,
    codebook: Callable[..., Outcome],
    tmp_path: Path,
) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / name).write_bytes(data)
    asked = ("prune", tiny, "--data", images_folder, "--data", tmp_path / "d", "--input-range", "0,1")
    before = sorted(tmp_path.rglob("*"))
    found = codebook(*asked)
    assert found.exit_code == 1 and found.stdout == "" and found.stderr.count("\n") == 1
    assert name in found.stderr and re.search(reason, found.stderr)
    assert sorted(tmp_path.rglob("*")) == before
    found = codebook(*asked, "--skip-bad", "--json", "-o", tmp_path / "out.safetensors")
    if "--size" in reason:
        assert found.exit_code == 1
        return
    assert found.exit_code == 0
    assert len(found.json["warnings"]) == 1
    assert re.fullmatch(rf"1 unreadable images were skipped: {name} \(.*{reason}.*\)", found.json["warnings"][0])


# --- sizes ---------------------------------------------------------------------------------------------------------


def test_images_of_unlike_sizes_are_named_with_both_sizes(tmp_path: Path) -> None:
    put(tmp_path / "a.png", picture(0, (8, 6, 3)))
    put(tmp_path / "b.png", picture(1, (9, 6, 3)))
    for skip_bad in (False, True):  # not a damaged file: --skip-bad must not hide it
        with pytest.raises(CodebookError, match=r"b\.png is 6x9, a\.png is 6x8; give --size"):
            read(find_images([tmp_path]), skip_bad=skip_bad)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 24), (40, 9), (5, 64)])
def test_size_makes_squares_of_whatever_comes(height: int, width: int, tmp_path: Path) -> None:
    put(tmp_path / "a.png", picture(0, (height, width, 3)))
    put(tmp_path / "b.png", picture(1, (8, 8, 3)))
    found = read(find_images([tmp_path]), size=8)
    assert found.shape == (2, 3, 8, 8)
    assert torch.equal(found[1:], as_tensor(picture(1)))  # what fits already stays as it is


def test_size_keeps_the_middle_and_the_proportions(tmp_path: Path) -> None:
    wide = np.zeros((16, 64, 3), dtype=np.uint8)
    wide[:, 24:40] = [255, 0, 0]  # the middle square is red
    put(tmp_path / "a.png", wide)
    found = read(find_images([tmp_path]), size=4)
    assert torch.equal(found[0, 0, :, 1:3], torch.ones(4, 2)) and torch.equal(found[0, 1:], torch.zeros(2, 4, 4))
    assert float(found[0, 0].min()) > 0.9  # the filter sees a little of the black beside the cut


@pytest.mark.parametrize("channels", [1, 3])
def test_size_brings_all_kinds_together_in_the_models_channels(channels: int, tmp_path: Path) -> None:
    """Evenly grey or evenly red pictures stay so, enlarged, shrunk, cut from strips, and whatever they store."""
    for i, (height, width) in enumerate([(1, 1), (1, 9), (9, 1), (3, 5), (8, 8), (40, 30), (7, 300)]):
        Image.new("L", (width, height), 100).save(tmp_path / f"grey{i}.png")
        Image.new("RGB", (width, height), (200, 100, 50)).save(tmp_path / f"red{i}.png")
        Image.new("RGBA", (width, height), (200, 100, 50, 0)).save(tmp_path / f"red-hidden{i}.png")
    items = find_images([tmp_path])
    found = read(items, channels, size=8) * 255
    for item, pixels in zip(items, found, strict=True):
        colour = [100] * channels if "grey" in item.name else [200, 100, 50] if channels == 3 else [124]
        assert pixels.flatten(1).round().unique(dim=1).flatten().tolist() == colour, item.name


def test_size_enlarges_smoothly_about_the_middle(tmp_path: Path) -> None:
    """Of 32 columns over 8, number 13 has its centre at 13.5 / 4 - 0.5 = 2.875 of the ramp's steps of 30."""
    put(tmp_path / "x.png", np.array([range(0, 240, 30)] * 8, dtype=np.uint8))
    row = read(find_images([tmp_path]), 1, size=32)[0, 0, 16] * 255
    assert bool((row.diff() >= 0).all()) and abs(float(row.mean()) - 105) < 1
    assert row[13].round() == 86 and row[18].round() == 124


def test_size_shrinks_with_a_filter_that_does_not_alias(tmp_path: Path) -> None:
    """One-pixel stripes have mean one half; taking every fourth pixel would give black or white."""
    put(tmp_path / "a.png", np.tile(np.array([0, 255], dtype=np.uint8), (32, 16)))
    found = read(find_images([tmp_path]), 1, size=8)
    assert float((found - 0.5).abs().max()) < 0.05


@pytest.mark.parametrize(
    ("height", "width", "stride", "top", "left"),
    [(8, 8, 4, 0, 0), (11, 9, 4, 1, 0), (10, 15, 8, 1, 3), (7, 5, 1, 0, 0), (9, 9, 5, 2, 2)],
)
def test_sides_are_cut_to_the_stride_from_the_centre(
    height: int, width: int, stride: int, top: int, left: int, tmp_path: Path
) -> None:
    pixels = picture(0, (height, width, 3))
    put(tmp_path / "a.png", pixels)
    rows, columns = height // stride * stride, width // stride * stride
    found = read(find_images([tmp_path]), stride=stride)
    assert torch.equal(found, as_tensor(pixels[top : top + rows, left : left + columns]))


def test_an_image_smaller_than_the_stride_is_unreadable(tmp_path: Path) -> None:
    put(tmp_path / "a.png", picture(0, (3, 9, 3)))
    with pytest.raises(CodebookError, match="9x3 is smaller than the model's stride of 4"):
        read(find_images([tmp_path]), stride=4)


# --- reading twice -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [0, 3 * 16 * 16 * 5, 2 << 30])
@pytest.mark.parametrize("source", ["folder", "tar", "array", "sample"])
def test_reading_twice_gives_the_same_whatever_fits_the_cache(
    source: str,
    cache: int,
    images_folder: Path,
    images_tar: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(media_module, "CACHE_BYTES", cache)
    np.save(tmp_path / "x.npy", picture(0, (20, 16, 16, 3)))
    sources: dict[str, Callable[[], list[Item]]] = {
        "folder": lambda: find_images([images_folder]),
        "tar": lambda: find_images([images_tar]),
        "array": lambda: find_images([tmp_path / "x.npy"]),
        "sample": lambda: sample_images()[::100],
    }
    images = Images(sources[source](), 3)
    first, second = (list(images.batches(7)) for _ in range(2))
    again = list(Images(sources[source](), 3).batches(7))
    for other in (second, again):
        assert [names(items) for items, _ in other] == [names(items) for items, _ in first]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, other, strict=True))


def test_batches_are_in_order_whole_and_in_range(images_folder: Path) -> None:
    items = find_images([images_folder])
    images = Images(items, 3)
    batches = list(images.batches(16))
    assert [len(found) for found, _ in batches] == [16, 16, 16, 12]
    assert names([item for found, _ in batches for item in found]) == names(items)
    pixels = torch.cat([pixels for _, pixels in batches])
    assert pixels.dtype == torch.float32 and float(pixels.min()) >= 0 and float(pixels.max()) <= 1
    assert torch.equal(pixels, images.load(items)[1]) and len(images) == 60


def test_changing_a_batch_changes_nothing_that_is_read_later(images_folder: Path) -> None:
    images = Images(find_images([images_folder]), 3)
    _, first = images.load(images.items[:4])
    before = first.clone()
    first.zero_()
    assert torch.equal(images.load(images.items[:4])[1], before)


# --- splits --------------------------------------------------------------------------------------------------------


def fake(name: str, content: bytes = b"", group: str | None = None) -> Item:
    return Item(name, Source(name, 1, lambda: io.BytesIO(content)), lambda channels: picture(0), group)


def fakes(count: int, prefix: str = "") -> list[Item]:
    return [fake(f"{prefix}{i:05d}.png") for i in range(count)]


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
    with pytest.raises(CodebookError, match="the test split of 3 images is empty"):
        split(by_side["data"][:3])
    with pytest.raises(CodebookError, match="the calibration split of 2 images is empty"):
        split(by_side["test"][:2])
    with pytest.raises(CodebookError, match="the test split"):
        split([])


def test_with_explicit_test_data_all_of_the_data_is_calibration_data() -> None:
    data, test = ([fake(f"{part}/{i}.png", bytes([i])) for i in range(n, m)] for part, n, m in (("a", 0, 200), ("b", 200, 230)))
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


# --- the bundled sample --------------------------------------------------------------------------------------------


def rectangle(item: Item) -> tuple[str, int, int]:
    """Photograph, top and left of a patch, from its name alone."""
    _, photograph, _, place = item.name.split("/")
    top, left = place.split("-")
    return photograph, int(top), int(left)


def test_the_sample_is_patches_of_both_photographs_where_their_names_say() -> None:
    items = sample_images()
    photographs = sample_photographs()
    assert len(items) == len(set(names(items))) == 3072
    assert {rectangle(item)[0] for item in items} == {"china", "flower"} == set(photographs)
    for item in items[::97]:
        name, top, left = rectangle(item)
        expected = photographs[name][top : top + 32, left : left + 32]
        assert expected.shape == (32, 32, 3)
        assert torch.equal(read([item]), as_tensor(expected))


def test_no_pixel_of_the_sample_is_in_two_splits() -> None:
    covered = {}
    found = split(sample_images())
    for part in ("train", "validation", "test"):
        covered[part] = np.zeros((2, 427, 640), dtype=bool)
        for item in getattr(found, part):
            photograph, top, left = rectangle(item)
            covered[part][("china", "flower").index(photograph), top : top + 32, left : left + 32] = True
        assert covered[part].any()
    for one, other in combinations(covered, 2):
        assert not (covered[one] & covered[other]).any(), (one, other)


def test_limiting_the_sample_first_keeps_its_splits_apart() -> None:
    regions = {}
    found = split(limited(sample_images(), 400, seed=3))
    for part in ("train", "validation", "test"):
        regions[part] = {item.name.rpartition("/")[0] for item in getattr(found, part)}
    assert all(not one & other for one, other in combinations(regions.values(), 2))


# --- limited -------------------------------------------------------------------------------------------------------


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
