"""Images: arrays, sizes and the bundled sample."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from drawing import Pixels, as_tensor, names, picture, put, read
from numpy.typing import NDArray
from PIL import Image
from sources_of_images import find_images

from codebook_tools.data.audio import Waveforms
from codebook_tools.data.images import Images, array_items, sample_images, sample_photographs
from codebook_tools.data.items import Item
from codebook_tools.data.splits import limited, split
from codebook_tools.errors import CodebookError

RGB, GRAY = picture(0, (12, 6, 7, 3)), picture(1, (12, 6, 7))
GRAY_AS_RGB = np.repeat(GRAY[..., None], 3, axis=3)
LAYOUTS: dict[str, tuple[NDArray[np.generic], Pixels]] = {
    "n,h,w,3": (RGB, RGB),
    "n,3,h,w": (RGB.transpose(0, 3, 1, 2), RGB),
    "n,h,w": (GRAY, GRAY_AS_RGB),
    "n,h,w,1": (GRAY[..., None], GRAY_AS_RGB),
    "n,1,h,w": (GRAY[:, None], GRAY_AS_RGB),
    "fortran order": (np.asfortranarray(RGB), RGB),
    "float32": ((RGB / 255).astype(np.float32), RGB),
    "float64, channels first": (RGB.transpose(0, 3, 1, 2) / 255, RGB),
    "big-endian": ((RGB / 255).astype(">f4"), RGB),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_of_every_layout_give_the_same_pixels(layout: str, tmp_path: Path) -> None:
    array, expected = LAYOUTS[layout]
    np.save(tmp_path / "x.npy", array)
    np.savez_compressed(tmp_path / "x.npz", anything=array)
    for file in ("x.npy", "x.npz"):
        items = find_images([tmp_path / file])
        assert names(items) == [f"{file}#{i}" for i in range(12)]  # in the order of rows, not of text: 2 before 10
        assert torch.equal(read(items), as_tensor(*(expected[int(item.name.partition("#")[2])] for item in items)))


@pytest.mark.parametrize("dtype", ["float16", ">f8"])
def test_floating_point_stays_float32_beside_pictures_and_in_luma(dtype: str, tmp_path: Path) -> None:
    """In 8 bits 0.5 and 0.501 would both be 128 of 255, and 0.299 x 0.2 + 0.587 x 0.4 + 0.114 x 0.6 = 0.363 is 92.6."""
    rows = np.array([[[0, 0.5], [0.501, 0.5 + 2**-11]], [[1, 2**-20], [1 / 3, 0.7]]]).astype(dtype)
    np.save(tmp_path / "x.npy", rows)
    gray = put(tmp_path / "a.png", picture(0, (2, 2)))
    pixels = read(find_images([gray, tmp_path / "x.npy"]), 1)
    assert torch.equal(pixels[1:, 0], torch.from_numpy(rows.astype(np.float32)))
    assert torch.equal(pixels[:1], as_tensor(picture(0, (2, 2))[..., None]))
    color = np.array([0.2, 0.4, 0.6], dtype=np.float32).reshape(1, 1, 1, 3)
    assert float(read(array_items("x", color), 1, mixing="mix")) == pytest.approx(0.363, abs=1e-7)


def test_arrays_that_are_no_images_say_why(tmp_path: Path) -> None:
    arrays: list[tuple[NDArray[np.generic], str]] = [
        (np.zeros((3, 4)), r"shape \(3, 4\): expected"),
        (np.zeros((3, 4, 5, 2)), r"shape \(3, 4, 5, 2\): expected"),
        (np.zeros((2, 3, 4, 5, 3)), "expected"),
        (np.zeros((3, 4, 5), dtype=np.int64), "dtype int64"),
        (np.zeros((0, 4, 5), dtype=np.uint8), r"x\.npy has shape \(0, 4, 5\): it holds no rows, which images are"),
        (np.zeros((3, 0, 5, 3)), "it holds images without pixels"),
        (np.array([{"a": 1}], dtype=object), "is not a readable array file"),
    ]
    for array, message in arrays:
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(CodebookError, match=message):
            find_images([tmp_path / "x.npy"])
    path = tmp_path / "x.npz"
    np.savez(path, a=GRAY, b=GRAY)
    with pytest.raises(CodebookError, match="holds 2 arrays"):
        find_images([path])
    np.savez_compressed(path, a=GRAY)
    data = bytearray(path.read_bytes())
    data[80:120] = bytes(40)  # damage inside
    path.write_bytes(data)
    with pytest.raises(CodebookError, match="is not a readable array file"):
        find_images([path])


def test_floating_point_pixels_outside_zero_and_one_are_unreadable() -> None:
    beyond = r"must lie in \[0, 1\]"
    for value, message in ((-0.01, beyond), (1.01, beyond), (np.nan, "not finite"), (np.inf, "not finite")):
        rows = np.full((2, 4, 4), 0.5)
        rows[1, 2, 2] = value
        with pytest.raises(CodebookError, match=f"cannot read image x#1: .*{message}; --skip-bad"):
            read(array_items("x", rows), 1)


# --- sizes -----------------------------------------------------------------------------------------------------------
def test_images_of_unlike_sizes_are_no_damage_and_named_with_both_sizes(tmp_path: Path) -> None:
    put(tmp_path / "a.png", picture(0, (8, 6, 3)))
    put(tmp_path / "b.png", picture(1, (9, 6, 3)))
    for skip_bad in (False, True):
        with pytest.raises(CodebookError, match=r"b\.png is 6x9, a\.png is 6x8; give --size"):
            read(find_images([tmp_path]), skip_bad=skip_bad)


def test_size_brings_all_kinds_together_in_the_models_channels(tmp_path: Path) -> None:
    """Evenly gray or evenly red pictures stay so, enlarged, shrunk, cut from strips, and whatever they store."""
    for i, (height, width) in enumerate([(1, 1), (1, 9), (9, 1), (3, 5), (8, 8), (40, 30), (7, 300)]):
        Image.new("L", (width, height), 100).save(tmp_path / f"gray{i}.png")
        Image.new("RGB", (width, height), (200, 100, 50)).save(tmp_path / f"red{i}.png")
        Image.new("RGBA", (width, height), (200, 100, 50, 0)).save(tmp_path / f"red-hidden{i}.png")
    items = find_images([tmp_path])
    for channels, red in ((1, [124]), (3, [200, 100, 50])):
        for item, pixels in zip(items, read(items, channels, size=8, mixing="mix") * 255, strict=True):
            color = [100] * channels if "gray" in item.name else red
            assert pixels.flatten(1).round().unique(dim=1).flatten().tolist() == color, item.name


def test_size_keeps_the_middle_and_the_proportions(tmp_path: Path) -> None:
    wide = np.zeros((16, 64, 3), dtype=np.uint8)
    wide[:, 24:40] = [255, 0, 0]  # the middle square is red
    pixels = read(find_images([put(tmp_path / "a.png", wide)]), size=4)[0]
    assert torch.equal(pixels[0, :, 1:3], torch.ones(4, 2)) and torch.equal(pixels[1:], torch.zeros(2, 4, 4))
    assert float(pixels[0].min()) > 0.9  # the filter sees a little of the black beside the cut


def test_size_enlarges_smoothly_and_shrinks_without_aliasing() -> None:
    """Of 32 columns over 8, number 13 has its center at 13.5 / 4 - 0.5 = 2.875 of the ramp's steps of 30. One-pixel
    stripes have mean one half; taking every fourth pixel would give black or white."""
    ramp = np.array([[range(0, 240, 30)] * 8], dtype=np.uint8)
    row = read(array_items("x", ramp), 1, size=32)[0, 0, 16] * 255
    assert bool((row.diff() >= 0).all()) and abs(float(row.mean()) - 105) < 1
    assert row[13].round() == 86 and row[18].round() == 124
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (1, 32, 16))
    assert float((read(array_items("x", stripes), 1, size=8) - 0.5).abs().max()) < 0.05


def test_size_does_not_round_floats_and_keeps_edges_between_black_and_white() -> None:
    """Both halves are 128 of 255 in 8 bits, and as much as one is above their mean, the other is below."""
    halves = np.full((1, 8, 12), 0.5, dtype=np.float32)
    halves[..., 6:] = 0.501
    for side in (2, 8, 20):
        row = read(array_items("x", halves), 1, size=side)[0, 0, 0]
        assert float(row[0]) < 0.50025 and float(row[-1]) > 0.50075
        assert torch.allclose(row + row.flip(0), torch.tensor(1.001), atol=1e-6)
    for white in (np.uint8(255), np.float32(1)):
        edge = np.zeros((1, 4, 4), dtype=white.dtype)
        edge[..., 2:] = white
        pixels = read(array_items("x", edge), 1, size=16)
        assert float(pixels.min()) == 0 and float(pixels.max()) == 1


def test_sides_are_cropped_to_the_stride_about_the_center(tmp_path: Path) -> None:
    for height, width, stride, top, left in ((8, 8, 4, 0, 0), (10, 15, 8, 1, 3), (7, 5, 1, 0, 0), (9, 9, 5, 2, 2)):
        pixels = picture(0, (height, width, 3))
        items = find_images([put(tmp_path / "a.png", pixels)])
        rows, columns = height // stride * stride, width // stride * stride
        assert torch.equal(read(items, stride=stride), as_tensor(pixels[top : top + rows, left : left + columns]))
        with pytest.raises(CodebookError, match=f"{width}x{height} is smaller than the model's stride of 16"):
            read(items, stride=16)


# --- the bundled sample ----------------------------------------------------------------------------------------------
def rectangle(item: Item) -> tuple[str, int, int]:
    """Photograph, top and left of a patch, from its name alone."""
    _, photograph, _, place = item.name.split("/")
    top, left = place.split("-")
    return photograph, int(top), int(left)


def test_the_sample_is_patches_of_both_photographs_where_their_names_say() -> None:
    items, photographs = sample_images(), sample_photographs()
    assert len(items) == len(set(names(items))) == 3072
    assert {rectangle(item)[0] for item in items} == {"china", "flower"} == set(photographs)
    for item in items[::97]:
        name, top, left = rectangle(item)
        assert torch.equal(read([item]), as_tensor(photographs[name][top : top + 32, left : left + 32]))


def test_no_pixel_of_the_sample_is_in_two_splits() -> None:
    for limit in (None, 400):
        splits, covered = split(limited(sample_images(), limit, seed=3)), {}
        for part in ("train", "validation", "test"):
            covered[part] = np.zeros((2, 427, 640), dtype=bool)
            for item in getattr(splits, part):
                photograph, top, left = rectangle(item)
                covered[part][("china", "flower").index(photograph), top : top + 32, left : left + 32] = True
            assert covered[part].any()
        assert not any((one & other).any() for one, other in combinations(covered.values(), 2))


@pytest.mark.parametrize("size", [(16, 40), (24, 24), 24])
@pytest.mark.parametrize("crop", ["center", "none"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_pictures_are_cut_or_resized_to_height_and_width(size: int | tuple[int, int], crop: str, dtype: type) -> None:
    """As Pillow resizes all of the picture, or the largest part of the wanted shape about its center."""
    pixels = picture(0, (60, 90, 3))
    height, width = (size, size) if isinstance(size, int) else size
    kept = 60 * width / height, 60.0
    if kept[0] > 90:
        kept = 90.0, 90 * height / width
    left, top = (90 - kept[0]) / 2, (60 - kept[1]) / 2
    box = (left, top, left + kept[0], top + kept[1]) if crop == "center" else None
    expected = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC, box=box)
    values = pixels.transpose(2, 0, 1) if dtype is np.uint8 else (pixels.transpose(2, 0, 1) / 255).astype(np.float32)
    made = Images.of(None, size, crop).fitted(values)
    wanted = np.asarray(expected).transpose(2, 0, 1)
    if dtype is np.uint8:
        assert np.array_equal(made, wanted)
    else:
        assert np.abs(made * 255 - wanted).max() < 2  # Pillow rounds 8 bits between its two passes


def test_a_whole_picture_is_resized_to_multiples_of_the_stride() -> None:
    values = picture(0, (35, 50, 3)).transpose(2, 0, 1)
    assert replace(Images.of(None, None, "none"), stride=8).fitted(values).shape == (3, 32, 48)
    center = replace(Images.of(None, None), stride=8).fitted(values)
    assert np.array_equal(center, values[:, 1:33, 1:49])
    with pytest.raises(CodebookError, match="--size 70000 is longer"):
        Images.of(None, (16, 70000))
    with pytest.raises(CodebookError, match="a clip has samples"):
        Waveforms.of(None, (16, 16))
