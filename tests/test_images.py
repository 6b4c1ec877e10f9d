"""Images: every kind of source read whole, twice, and split so that nothing leaks."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from codebook_tools import images as images_module
from codebook_tools.errors import CodebookError
from codebook_tools.images import Images, Item, Splits, array_items, find_images, limited, sample_images, split

Pixels = NDArray[np.uint8]
SHARED = Path(__file__).parents[1] / ".." / "shared"
FASHION = SHARED / "data" / "fashion-test.tar"


def picture(seed: int, shape: tuple[int, ...] = (8, 8, 3)) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_stands_upright_as_its_exif_says(orientation: int, tmp_path: Path) -> None:
    upright = picture(1, (4, 6, 3))
    undone = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1]}
    # Of 5 to 8 the stored rows are columns of what was seen: row 0 its left side or (6, 7) right, column 0 its top or
    # (7, 8) bottom.
    seen = {5: upright, 6: upright[:, ::-1], 7: upright[::-1, ::-1], 8: upright[::-1]}
    undone |= {number: turned.transpose(1, 0, 2) for number, turned in seen.items()}
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(undone[orientation])).save(tmp_path / "x.png", exif=exif)
    assert torch.equal(read(find_images([tmp_path])), as_tensor(upright))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_not_clipped(suffix: str, channels: int, tmp_path: Path) -> None:
    values = np.array([[0, 128, 257, 2570], [32896, 51400, 65278, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    found = read(find_images([tmp_path]), channels)
    assert (found[0, 0] * 255).round().flatten().tolist() == [0, 0, 1, 10, 128, 200, 254, 255]


def test_pictures_without_a_fixed_range_are_unreadable_not_guessed(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(CodebookError, match="no fixed range"):
        read(find_images([tmp_path]), 1)


@pytest.mark.parametrize("suffix", ["jpg", "webp", "bmp", "tif"])
def test_formats_by_suffix_are_decoded_as_pillow_does(suffix: str, tmp_path: Path) -> None:
    Image.fromarray(picture(2, (10, 12, 3))).save(tmp_path / f"x.{suffix}")
    expected = np.asarray(Image.open(tmp_path / f"x.{suffix}").convert("RGB"))
    assert torch.equal(read(find_images([tmp_path])), as_tensor(expected))


# --- unreadable images ---------------------------------------------------------------------------------------------


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
        assert source.bad == ["c.png"]
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
    assert source.bad == ["a.png", "b.png", "d.png"]


def test_a_file_that_vanished_after_listing_is_unreadable(tmp_path: Path) -> None:
    put(tmp_path / "a.png", picture(0))
    put(tmp_path / "b.png", picture(1))
    items = find_images([tmp_path])
    (tmp_path / "a.png").unlink()
    with pytest.raises(CodebookError, match=r"cannot read image a\.png"):
        read(items)
    assert len(read(items, skip_bad=True)) == 1


# --- sizes ---------------------------------------------------------------------------------------------------------


def test_images_of_unlike_sizes_are_named_with_both_sizes(tmp_path: Path) -> None:
    put(tmp_path / "a.png", picture(0, (8, 6, 3)))
    put(tmp_path / "b.png", picture(1, (9, 6, 3)))
    for skip_bad in (False, True):  # not a damaged file: --skip-bad must not hide it
        with pytest.raises(CodebookError, match=r"b\.png is 6x9, earlier ones are 6x8; give --size"):
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
    monkeypatch.setattr(images_module, "_DECODED_CACHE_BYTES", cache)
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


def fakes(count: int, prefix: str = "") -> list[Item]:
    return [Item(f"{prefix}{i:05d}.png", 1, lambda: b"", lambda data, channels: picture(0)) for i in range(count)]


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
    items = [Item(name, 1, bytes, lambda data, channels: picture(0)) for name in given_]
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
    data, test = fakes(200, "a/"), fakes(30, "b/")
    for i, item in enumerate([*data, *test]):
        object.__setattr__(item, "read", lambda i=i: bytes([i]))
    found = split(data, test)
    assert found.test == test
    assert names(found.calibration) == names(data)
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
    photographs = images_module.sample_photographs()
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
