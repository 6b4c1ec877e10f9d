"""Pictures: every kind of stored pixel is decoded as it is meant, and what cannot be is named."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from drawing import as_tensor, picture, png_of, put, read, saved, tiff_of
from PIL import Image
from sources_of_images import Images, find_images
from torch import Tensor

from codebook_tools.errors import CodebookError

Decode = Callable[..., Tensor]


@pytest.fixture
def decoded(tmp_path: Path) -> Decode:
    """decoded(data, channels): the pixels of a stored picture, (channels, height, width) in [0, 255], whatever its
    suffix."""

    def decode(data: bytes, channels: int = 3, mixing: str | None = "mix") -> Tensor:
        (tmp_path / "x.png").write_bytes(data)
        return read(find_images([tmp_path / "x.png"]), channels, mixing=mixing)[0] * 255

    return decode


COLORS = [[200, 100, 50], [10, 20, 30]]
"""What every picture of IN_COLOR shows, its second pixel often hidden by alpha. Their luma is 124.2 and 18.15."""

FOUR = [200, 100, 50, 255, 10, 20, 30, 0]
THREE = [200, 100, 50, 10, 20, 30]
PALETTE = bytes(THREE)
CMYK = bytes([55, 155, 205, 0, 245, 235, 225, 0])
RGBA_IMAGE = Image.fromarray(np.array(FOUR, dtype=np.uint8).reshape(1, 2, 4))
RGB_IMAGE = Image.fromarray(np.array([COLORS], dtype=np.uint8))


def words(values: list[int], order: str) -> bytes:
    """16 bits that stand for 8."""
    return struct.pack(f"{order}{len(values)}H", *(257 * value for value in values))


IN_COLOR = {
    "RGB": png_of(2, 8, [THREE]),
    "RGBA": png_of(6, 8, [FOUR]),
    "RGB with one color transparent": png_of(2, 8, [THREE], tRNS=struct.pack(">3H", 10, 20, 30)),
    "palette": png_of(3, 8, [[0, 1]], PLTE=PALETTE),
    "palette with a transparent color": png_of(3, 8, [[0, 1]], PLTE=PALETTE, tRNS=bytes([255, 0])),
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


DEFLATED = {order: zlib.compress(words([200, 10], order)) for order in "<>"}
IN_GRAY = {
    "gray": png_of(0, 8, [[200, 10]]),
    "with alpha": png_of(4, 8, [[200, 255, 10, 0]]),
    "with alpha of the same numbers": png_of(4, 8, [[200, 200, 10, 10]]),
    "with one gray transparent": png_of(0, 8, [[200, 10]], tRNS=struct.pack(">H", 10)),
    "16 bits": png_of(0, 16, [[257 * 200, 257 * 10]]),
    "16 bits, one transparent": png_of(0, 16, [[257 * 200, 257 * 10]], tRNS=struct.pack(">H", 2570)),
    "16 bits with alpha": png_of(4, 16, [[257 * 200, 65535, 257 * 10, 0]]),
    "16 bits, not multiples of 257": png_of(0, 16, [[51_500, 2_500]]),
    "gray tiff of 16 bits, little-endian": tiff_of(words([200, 10], "<"), 2, 16, 1),
    "gray tiff of 16 bits, big-endian": tiff_of(words([200, 10], ">"), 2, 16, 1, order=">"),
    "gray tiff of 16 bits, upside down": tiff_of(words([10, 200], ">"), 2, 16, 1, order=">", orientation=3),
    "deflated gray tiff of 16 bits": tiff_of(DEFLATED["<"], 2, 16, 1, compression=8),
    "deflated gray tiff of 16 bits, big-endian": tiff_of(DEFLATED[">"], 2, 16, 1, order=">", compression=8),
    "gray tiff of 16 bits, white at zero": tiff_of(words([55, 245], "<"), 2, 16, 0),
    "gray tiff of 8 bits, white at zero": tiff_of(bytes([55, 245]), 2, 8, 0),
    "gray tiff of 12 bits: 3212 and 161 of 4095": tiff_of(bytes([0xC8, 0xC0, 0xA1]), 2, 12, 1),
    "gray tiff with alpha": tiff_of(bytes([200, 255, 10, 0]), 2, 8, 1, 2, extra=2),
    "gray tiff multiplied by alpha: 6 of 153 is 10 of 255": tiff_of(bytes([200, 255, 6, 153]), 2, 8, 1, 2, extra=1),
}  # fmt: skip

READ_BY_NEW_PILLOW = pytest.mark.skipif(
    int(PIL.__version__.partition(".")[0]) < 13, reason="Pillow before 13 cannot open them; what it cannot is refused"
)
STORED = IN_COLOR | IN_GRAY


KINDS = [pytest.param(kind, marks=READ_BY_NEW_PILLOW if "multiplied" in kind else ()) for kind in STORED]


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_stored_whatever_their_depth_and_alpha(kind: str, decoded: Decode) -> None:
    rgb, gray = (COLORS, [124, 18]) if kind in IN_COLOR else ([[200] * 3, [10] * 3], [200, 10])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoded(STORED[kind])[:, 0].T.round().tolist() == rgb
        assert decoded(STORED[kind], 1)[0, 0].round().tolist() == gray


TRANSPARENT_NOWHERE = png_of(3, 8, [[1, 1]], PLTE=PALETTE, tRNS=bytes([0, 255]))
GRAYS, IN_RGB = [[200, 10]], [[200, 10], [100, 20], [50, 30]]
WITHOUT_LOSS = {
    "gray": (png_of(0, 8, [[200, 10]]), GRAYS * 3),
    "gray with opaque alpha": (png_of(4, 8, [[200, 255, 10, 255]]), GRAYS * 3),
    "RGB of grays": (png_of(2, 8, [[200, 200, 200, 10, 10, 10]]), GRAYS * 3),
    "palette of grays": (png_of(3, 8, [[0, 1]], PLTE=bytes([200] * 3 + [10] * 3)), GRAYS * 3),
    "RGBA that is opaque": (png_of(6, 8, [[200, 100, 50, 255]]), [[200], [100], [50]]),
    "palette": (IN_COLOR["palette"], IN_RGB),
    "palette with a transparent color that no pixel has": (TRANSPARENT_NOWHERE, [[10, 10], [20, 20], [30, 30]]),
}
"""By kind, what is stored, and the red, green and blue of its pixels."""


def test_what_converts_without_a_loss_needs_no_option(decoded: Decode) -> None:
    for kind, (data, rgb) in WITHOUT_LOSS.items():
        for mixing in (None, "mix", "first"):
            for channels in (3, 1) if rgb[0] == rgb[1] else (3,):
                pixels = decoded(data, channels, mixing)[:, 0].round().tolist()
                assert pixels == rgb[:channels], (kind, mixing, channels)


WITH_LOSS = {
    "RGB": (3, 1, GRAYS), "palette": (3, 1, GRAYS), "RGBA": (4, 3, IN_RGB), "RGBA of 16 bits": (4, 1, GRAYS),
    "RGB with one color transparent": (4, 3, IN_RGB), "palette with alpha": (4, 3, IN_RGB),
    "with alpha": (2, 1, GRAYS), "with alpha of the same numbers": (2, 1, GRAYS),
    "16 bits, one transparent": (2, 3, GRAYS * 3),
}  # fmt: skip
"""Channels of the picture and of the network, and what --channels first makes of it."""


@pytest.mark.parametrize("kind", WITH_LOSS)
def test_what_loses_color_or_alpha_is_refused_until_asked_for(kind: str, decoded: Decode, tmp_path: Path) -> None:
    stored, channels, first = WITH_LOSS[kind]
    assert decoded(STORED[kind], channels, "first")[:, 0].round().tolist() == first
    message = f"^image x.png has {stored} channels, and the network takes {channels}: give --channels mix.first "
    for workers in (0, 1) if kind == "RGB" else (0,):
        source = Images(find_images([tmp_path]), channels, skip_bad=True)  # not damaged: --skip-bad must not hide it
        source.workers = workers
        with pytest.raises(CodebookError, match=message):
            list(source.batches(1))


def flat(mode: str, color: object) -> Image.Image:
    return Image.new(mode, (16, 16), color)  # type: ignore[arg-type]


RED_BLOCK, CMYK_BLOCK = flat("RGB", (200, 100, 50)), flat("CMYK", (0, 128, 255, 128))
LAB, YCBCR = tiff_of(bytes([255, 0, 0, 127, 0, 0]), 2, 8, 8, 3), tiff_of(bytes([76, 85, 255]), 1, 8, 6, 3)
JPEGS: tuple[dict[str, object], ...] = ({}, {"subsampling": 2}, {"keep_rgb": True}, {"progressive": True})


@pytest.mark.parametrize(
    ("data", "pixel", "within"),
    [
        *((saved(RED_BLOCK, "JPEG", quality=95, **how), [200, 100, 50], 3) for how in JPEGS),
        # A key of 128 leaves 127 of 255: without cyan 127, with 128 of magenta 127 * 127 / 255 = 63, all yellow 0.
        (saved(CMYK_BLOCK, "TIFF"), [127, 63, 0], 0),
        (saved(CMYK_BLOCK, "JPEG", quality=100), [127, 63, 0], 3),  # inverted, as Adobe does
        pytest.param(YCBCR, [255, 0, 0], 2, marks=READ_BY_NEW_PILLOW),
        pytest.param(LAB, [118] * 3, 2, marks=READ_BY_NEW_PILLOW),  # lightness 127 / 2.55 is 118 in sRGB
        (saved(Image.fromarray(np.array([[False, True]])), "PNG"), [255] * 3, 0),
    ],
)
def test_other_color_spaces_are_converted(data: bytes, pixel: list[int], within: int, decoded: Decode) -> None:
    assert float((decoded(data)[:, -1, -1] - torch.tensor(pixel)).abs().max()) <= within


def test_of_several_frames_or_pages_the_first_counts(decoded: Decode) -> None:
    frames = [flat("RGB", color) for color in ("red", "lime", "blue")]
    lossless, lzw = {"lossless": True}, {"compression": "tiff_lzw"}
    for kind, how in (("PNG", {}), ("WEBP", lossless), ("GIF", {}), ("TIFF", {}), ("TIFF", lzw)):
        pixels = decoded(saved(frames[0], kind, save_all=True, append_images=frames[1:], **how))
        assert torch.equal(pixels, torch.tensor([255.0, 0, 0]).reshape(3, 1, 1).expand(3, 16, 16)), (kind, how)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_stands_upright_as_its_exif_says(orientation: int, decoded: Decode) -> None:
    upright = picture(1, (2, 3, 3)).repeat(8, axis=0).repeat(8, axis=1)  # JPEG keeps blocks of one color
    undone = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1]}
    # Of 5 to 8 the stored rows are columns of the photograph: row 0 its left side or (6, 7) right, column 0 its top or
    # (7, 8) bottom.
    columns = {5: upright, 6: upright[:, ::-1], 7: upright[::-1, ::-1], 8: upright[::-1]}
    undone |= {number: turned.transpose(1, 0, 2) for number, turned in columns.items()}
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless, high = {"lossless": True}, {"quality": 95, "subsampling": 0}
    for kind, how, within in (("PNG", {}, 0), ("WEBP", lossless, 0), ("TIFF", {}, 0), ("JPEG", high, 4 / 255)):
        pixels = decoded(saved(Image.fromarray(np.ascontiguousarray(undone[orientation])), kind, exif=exif, **how))
        assert pixels.shape == (3, 16, 24)
        assert float((pixels / 255 - as_tensor(upright)[0]).abs().max()) <= within, kind


def test_damaged_exif_leaves_a_whole_picture_as_it_is(decoded: Decode) -> None:
    source = Image.fromarray(picture(3, (8, 9, 3)))
    for kind in ("PNG", "JPEG", "WEBP"):
        whole, odd = saved(source, kind), saved(source, kind, exif=b"Exif\0\0nothing of the kind")
        assert whole != odd and torch.equal(decoded(whole), decoded(odd))


def test_pictures_without_a_fixed_range_are_unreadable_not_guessed(decoded: Decode) -> None:
    numbers = (("<f", 0.5, 32, 3), ("<I", 7, 32, 1), ("<i", -7, 32, 2), ("<h", -7, 16, 2))  # a float, integers
    for packing, value, bits, kind in numbers:
        with pytest.raises(CodebookError, match="no fixed range"):
            decoded(tiff_of(struct.pack(packing, value), 1, bits, 1, format=kind), 1)


def test_every_suffix_is_listed_and_what_is_in_a_file_counts(tmp_path: Path) -> None:
    expected = picture(2, (1, 12, 3))
    for suffix in ("jpg", "Jpeg", "webp", "BMP", "tif", "TIFF"):
        for kind in ("PNG", "BMP", "TIFF"):
            path = tmp_path / suffix / f"x.{suffix}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(saved(Image.fromarray(expected), kind))
            assert torch.equal(read(find_images([path.parent])), as_tensor(expected))


def test_pillows_warning_is_silenced_and_its_limit_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    put(tmp_path / "a.png", picture(0, (8, 8, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read(find_images([tmp_path]))) == 1
    put(tmp_path / "b.png", picture(0, (16, 16, 3)))
    with pytest.raises(CodebookError, match=r"b\.png: too many pixels: .*256 pixels.* exceeds limit of 100"):
        read(find_images([tmp_path]), size=8)
