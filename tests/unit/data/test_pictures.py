"""Pictures: every kind of stored pixel is shown as it is meant, and what cannot be is named."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from conftest import Outcome
from drawing import as_tensor, picture, png, png_of, put, read, saved, tiff_of
from PIL import Image
from sources_of_images import Images, find_images

from codebook_tools.errors import CodebookError


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
        assert torch.equal(read(find_images([path]), channels, mixing="mix"), as_tensor(expected))


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
        assert (read(items, mixing="mix")[0, :, 0].T * 255).round().tolist() == COLOURS
        assert (read(items, 1, mixing="mix")[0, 0, 0] * 255).round().tolist() == [124, 18]


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

READ_BY_NEW_PILLOW = pytest.mark.skipif(
    int(PIL.__version__.partition(".")[0]) < 13, reason="Pillow before 13 cannot open them; what it cannot is refused"
)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=READ_BY_NEW_PILLOW if "multiplied" in k else ()) for k in IN_GREY]
)
def test_greys_are_those_stored_whatever_their_depth_and_alpha(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(IN_GREY[kind])
    for channels in (1, 3):
        found = read(find_images([tmp_path]), channels, mixing="mix")[0, :, 0] * 255
        assert found.round().tolist() == [[200, 10]] * channels, channels


WITHOUT_LOSS = {
    "grey": (png_of(0, 8, [[200, 10]]), [[200, 10]] * 3),
    "grey with opaque alpha": (png_of(4, 8, [[200, 255, 10, 255]]), [[200, 10]] * 3),
    "RGB of greys": (png_of(2, 8, [[200, 200, 200, 10, 10, 10]]), [[200, 10]] * 3),
    "palette of greys": (png_of(3, 8, [[0, 1]], PLTE=bytes([200] * 3 + [10] * 3)), [[200, 10]] * 3),
    "RGBA that is opaque": (png_of(6, 8, [[200, 100, 50, 255]]), [[200], [100], [50]]),
    "palette": (IN_COLOUR["palette"], [[200, 10], [100, 20], [50, 30]]),
    "palette with a transparent colour that no pixel has": (
        png_of(3, 8, [[1, 1]], PLTE=PALETTE, tRNS=bytes([0, 255])),
        [[10, 10], [20, 20], [30, 30]],
    ),
}
"""By kind, what is stored, and the red, green and blue of its pixels."""


@pytest.mark.parametrize("kind", WITHOUT_LOSS)
def test_what_converts_without_a_loss_needs_no_option(kind: str, tmp_path: Path) -> None:
    data, shown = WITHOUT_LOSS[kind]
    (tmp_path / "x.png").write_bytes(data)
    for mixing in (None, "mix", "first"):
        for channels in (3, 1) if shown[0] == shown[1] else (3,):
            found = read(find_images([tmp_path]), channels, mixing=mixing)[0, :, 0] * 255
            assert found.round().tolist() == shown[:channels], (mixing, channels)


RED, IN_RGB = [[200, 10]], [[200, 10], [100, 20], [50, 30]]
WITH_LOSS = {
    "RGB": (3, 1, RED),
    "palette": (3, 1, RED),
    "RGBA": (4, 3, IN_RGB),
    "RGBA of 16 bits": (4, 1, RED),
    "RGB with one colour transparent": (4, 3, IN_RGB),
    "palette with alpha": (4, 3, IN_RGB),
    "with alpha": (2, 1, RED),
    "with one grey transparent": (2, 3, RED * 3),
    "16 bits, one transparent": (2, 1, RED),
}
"""Of kinds in colour and in grey: their channels, the network's, and what --channels first makes of it."""


@pytest.mark.parametrize("kind", WITH_LOSS)
@pytest.mark.parametrize("workers", [0, 1])
def test_what_loses_colour_or_alpha_is_refused_until_it_is_asked_for(kind: str, workers: int, tmp_path: Path) -> None:
    stored, channels, first = WITH_LOSS[kind]
    (tmp_path / "x.png").write_bytes((IN_COLOUR | IN_GREY)[kind])
    items = find_images([tmp_path])
    source = Images(items, channels, skip_bad=True)  # it is not damaged: --skip-bad must not hide it
    source.workers = workers
    told = f"^image x.png has {stored} channels, and the network takes {channels}: give --channels mix.first "
    with pytest.raises(CodebookError, match=told):
        list(source.batches(1))
    assert (read(items, channels, mixing="first")[0, :, 0] * 255).round().tolist() == first


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


@READ_BY_NEW_PILLOW
def test_tiffs_of_other_colour_spaces_are_converted(tmp_path: Path) -> None:
    """Red in YCbCr; white and the middle grey of LAB, whose lightness 127 / 2.55 is 118 in sRGB."""
    (tmp_path / "x.tif").write_bytes(tiff_of(bytes([76, 85, 255]), 1, 8, 6, 3))
    found = read(find_images([tmp_path]))[0, :, 0, 0] * 255
    assert float((found - torch.tensor([255, 0, 0])).abs().max()) <= 2
    (tmp_path / "x.tif").write_bytes(tiff_of(bytes([255, 0, 0, 127, 0, 0]), 2, 8, 8, 3))
    for channels in (1, 3):
        found = read(find_images([tmp_path]), channels, mixing="mix")[0, :, 0] * 255
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


# --- unreadable pictures ---------------------------------------------------------------------------------------------


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
