"""Decoding of stored pictures by Pillow, with one rule for each kind of pixel and a reason for each failure."""

from __future__ import annotations

import io
import logging
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base

logging.getLogger("PIL").addHandler(logging.NullHandler())  # errors are raised, not logged

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""What is decoded, whatever a file's suffix. Pillow's other formats are not opened: EPS would start Ghostscript."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that turns a picture upright, by EXIF orientation."""

_DETOURS = {"LAB": "RGB", "La": "LA", "RGBa": "RGBA"}
"""Intermediate modes for those that Pillow cannot convert to L or RGB directly."""

_LARGE, _PIXELS_A_BYTE = 1 << 24, 1000
"""A picture with more pixels than _LARGE may have at most _PIXELS_A_BYTE pixels per byte of its file: deflate, the
strongest of the compressions, stores about a thousand bytes in one, so a file that claims more is blank at best."""

_BITS, _PHOTOMETRIC = Base.BitsPerSample, Base.PhotometricInterpretation


def decode_picture(data: bytes) -> NDArray[np.uint8]:
    """Decode a picture as the loaders of torchvision and diffusers do, whose output models are trained on.

    - EXIF orientation is applied; a damaged EXIF block is ignored. Of several frames or pages the first is used.
    - Alpha of every kind (RGBA, gray with alpha, tRNS of a palette or a color) leaves each pixel its stored color.
      Premultiplied alpha is divided out.
    - CMYK becomes RGB without a profile; CMYK JPEGs are taken as inverted, as Adobe writes them. Embedded profiles and
      gamma are not applied.
    - 12 and 16 bits are scaled to 8: gray to the nearest level; of color, and of gray with alpha, Pillow keeps the
      upper byte, which is at most one level away.

    Args:
        data: Content of the file.

    Returns:
        (channels, height, width): 1 channel of gray or 3 of RGB, and alpha as one more unless it is opaque everywhere.

    Raises:
        ValueError: With the reason: an empty or damaged file, an unknown format, more pixels than Pillow's limit
            against decompression bombs or than so few bytes can hold, or pixels without a fixed range (signed, 32 bits,
            floating point).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata, large sizes and palettes with alpha, which are handled here
        return _channels_first(_upright(_opened(data)))


def _opened(data: bytes) -> Image.Image:
    """The picture with its pixels as stored. Raises ValueError with the reason where it cannot be opened."""
    if not data:
        raise ValueError("the file is empty")
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        if picture.width * picture.height > max(_LARGE, _PIXELS_A_BYTE * len(data)):
            raise Image.DecompressionBombError(f"{picture.width} x {picture.height} in {len(data):,} bytes")
        picture.load()
    except MemoryError:
        raise
    except UnidentifiedImageError:
        looks_right = data.startswith((b"\x89PNG", b"\xff\xd8", b"RIFF", b"BM", b"II", b"MM"))
        reason = "damaged, or a picture of a rare kind" if looks_right else "no PNG, JPEG, WebP, BMP or TIFF picture"
        raise ValueError(f"{reason}: Pillow cannot open its content") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"too many pixels: {error}") from error
    except Exception as error:  # decoders raise whatever they like on a damaged file
        raise ValueError(f"damaged file: {error}") from error
    return picture


def _upright(picture: Image.Image) -> Image.Image:
    """The picture in 8 bits, turned by its EXIF orientation."""
    try:
        turn = TURNS.get(picture.getexif().get(Base.Orientation, 1))
    except Exception:  # damaged EXIF; the pixels are whole all the same
        turn = None
    decoded = _eight_bits(picture)
    return decoded if turn is None else decoded.transpose(turn)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """The picture in a mode that Pillow converts both to L and to RGB without losing the range."""
    if picture.mode in ("I", "F"):
        raise ValueError(
            f"its pixels ({picture.format}, mode {picture.mode}) have no fixed range; save it with 8 or 16 bits"
        )
    if picture.mode in _DETOURS:
        return picture.convert(_DETOURS[picture.mode])
    if not picture.mode.startswith("I;16"):
        return picture
    # Pillow clips these to 8 bits instead of scaling them, and ignores TIFF's 12 bits and white at zero.
    tags = getattr(picture, "tag_v2", {})
    top = 2 ** tags.get(_BITS, (16,))[0] - 1
    stored = np.asarray(picture)
    levels = np.round(stored / (top / 255)).astype(np.uint8)
    scaled = Image.fromarray(255 - levels if tags.get(_PHOTOMETRIC) == 0 else levels)
    if isinstance(transparent := picture.info.get("transparency"), int):
        scaled.putalpha(Image.fromarray(np.where(stored == transparent, 0, 255).astype(np.uint8)))
    return scaled


def decode_row(stored: NDArray[np.generic]) -> NDArray[Any]:
    """Convert a row of an array to pixels.

    Args:
        stored: (height, width), (height, width, 1|3) or (1|3, height, width), uint8 or floating point in [0, 1].

    Returns:
        (1|3, height, width), uint8 unchanged or float32.

    Raises:
        ValueError: Floating-point values are not finite, or outside [0, 1].
    """
    row: NDArray[Any] = np.asarray(stored)
    if row.dtype != np.uint8:
        if not np.isfinite(row).all():
            raise ValueError("a value is not finite")
        if row.min() < 0 or row.max() > 1:
            raise ValueError("floating-point images must lie in [0, 1]")
        row = row.astype(np.float32)
    if row.ndim == 2:
        return row[None]
    return row if row.shape[0] in (1, 3) and row.shape[2] not in (1, 3) else row.transpose(2, 0, 1)


def _channels_first(picture: Image.Image) -> NDArray[np.uint8]:
    """(channels, height, width) of a picture: gray or RGB, and its alpha where that is not opaque everywhere."""
    mode = "L" if picture.mode in ("1", "L", "LA") else "RGB"
    if picture.has_transparency_data:
        pixels = np.asarray(picture.convert(f"{mode}A")).transpose(2, 0, 1)
        return pixels if pixels[-1].min() < 255 else pixels[:-1]
    pixels = np.asarray(picture if picture.mode == mode else picture.convert(mode))
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)


def luma(pixels: NDArray[Any]) -> NDArray[Any]:
    """Luma by ITU-R BT.601, 0.299 R + 0.587 G + 0.114 B: (3, height, width) to (1, height, width), same dtype."""
    if pixels.dtype == np.uint8:
        return np.asarray(_picture(pixels).convert("L"))[None]
    return np.tensordot(_LUMA, pixels, axes=1)[None].astype(np.float32)


_LUMA = (0.299, 0.587, 0.114)


def _picture(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def resized(pixels: NDArray[Any], sides: tuple[int, int], whole: bool = False) -> NDArray[Any]:
    """Resize an image, or its center of the wanted shape, with an antialiasing bicubic filter.

    Args:
        pixels: (channels, height, width), uint8 or float32.
        sides: Height and width of the result in pixels.
        whole: Whether all of the image is resized, whatever its shape.

    Returns:
        (channels, *sides) of the same dtype, clipped to [0, 255] or [0, 1] where the filter overshoots.
    """
    height, width = sides

    def fitted(picture: Image.Image) -> Image.Image:
        if whole:
            return picture.resize((width, height), Image.Resampling.BICUBIC)
        return ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)

    if pixels.dtype == np.uint8:
        return _channels_first(fitted(_picture(pixels)))
    planes = [np.asarray(fitted(Image.fromarray(np.ascontiguousarray(plane)))) for plane in pixels]
    return np.stack(planes).clip(0, 1)
