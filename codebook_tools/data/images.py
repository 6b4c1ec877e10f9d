"""Images as items: pictures, rows of arrays, and the bundled sample."""

from __future__ import annotations

import io
import math
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from codebook_tools.data.image_decoding import decode_picture, decode_row, fitted, in_channels
from codebook_tools.data.items import Item, Medium, Values
from codebook_tools.data.sources import Source
from codebook_tools.errors import CodebookError, one_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LONGEST_SIDE = 1 << 14
"""Pixels of a side that images are resized to: 3 GB in float32, and an encoder makes a multiple of it."""
SAMPLE = "sample"
"""Stands for the bundled sample in messages: patches of the two photographs that scikit-learn ships."""


def images(size: int | None = None, stride: int = 1) -> Medium:
    """Images: pictures in folders and tars, one an item; .npy and .npz files, one item a row.

    size: side of a square that the centre of every image is cut and resized to; None: all must have one size. stride:
    height and width are cut to a multiple of it, from the centre. Raises CodebookError for a side that none has.
    """
    if size is not None and size > LONGEST_SIDE:
        raise CodebookError(f"--size {size} is longer than {LONGEST_SIDE} pixels")
    arrays = {".npy": _stored_items, ".npz": _stored_items}
    fit = partial(fitted, size=size, stride=stride)
    return Medium("image", "images", SUFFIXES, _picture_items, array_items, in_channels, _MIXES, arrays, fit)


_MIXES = "the luma of colours, or the first of them; alpha goes"


def _picture_items(source: Source) -> list[Item]:
    return [Item(source.name, source, partial(_picture, source))]


def _picture(source: Source) -> Values:
    return decode_picture(source.read())


def _stored_items(path: Path) -> list[Item]:
    try:
        _refuse_bomb(path)
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = [(path.name, loaded)] if isinstance(loaded, np.ndarray) else [(path.name, loaded[k]) for k in loaded]
    except Exception as error:  # numpy and zipfile raise whatever they like on a damaged file
        raise CodebookError(f"{path} is not a readable array file: {one_line(error)}") from error
    if not all(isinstance(array, np.ndarray) for _, array in arrays):
        raise CodebookError(f"{path} holds what is no array; give a .npz with one array of images, or a .npy")
    if len(arrays) > 1:
        raise CodebookError(f"{path} holds {len(arrays)} arrays; give a .npz with one array of images, or a .npy")
    return [item for name, array in arrays for item in array_items(name, array)]


def _refuse_bomb(path: Path) -> None:
    """Raise ValueError for a .npz that is far longer in memory than on disk: pictures are not."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        packed, whole = (sum(getattr(its, n) for its in archive.infolist()) for n in ("compress_size", "file_size"))
    if whole > max(1 << 30, 200 * packed):
        raise ValueError(f"{packed:,} bytes that unpack to {whole:,} look like a decompression bomb")


def array_items(name: str, array: NDArray[np.generic]) -> list[Item]:
    """One item a row, named NAME#row, from (n, height, width) or (n, height, width, 1|3) or (n, 1|3, height, width).

    uint8, or floating point in [0, 1].
    """
    if array.ndim not in (3, 4) or (array.ndim == 4 and 1 not in _channels(array) and 3 not in _channels(array)):
        raise CodebookError(
            f"{name} has shape {array.shape}: expected (n, h, w), (n, h, w, 1 or 3) or (n, 1 or 3, h, w)"
        )
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise CodebookError(f"{name} has dtype {array.dtype}: expected uint8, or floating point in [0, 1]")
    if 0 in array.shape:
        what = "images without pixels" if len(array) else "no rows, which images are"
        raise CodebookError(f"{name} has shape {array.shape}: it holds {what}")
    rows: NDArray[Any] | _FileRows = array.view(np.ndarray)
    file = None
    if isinstance(array, np.memmap):
        file = str(array.filename)
        rows = _FileRows(file, array.offset, array.dtype, array.shape[1:]) if array.flags.c_contiguous else rows
    nbytes = array[:1].nbytes
    return [_row_item(f"{name}#{i}", _Row(rows, i), nbytes, file) for i in range(len(array))]


def _channels(array: NDArray[np.generic]) -> tuple[int, int]:
    return array.shape[1], array.shape[3]


@dataclass(frozen=True, eq=False)
class _FileRows:
    """Rows of an array in a file, read when asked for: what is mapped counts as memory once it was touched."""

    file: str
    start: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __getitem__(self, number: int) -> NDArray[Any]:
        count = math.prod(self.shape)
        at = self.start + number * count * self.dtype.itemsize
        return np.fromfile(self.file, self.dtype, count, offset=at).reshape(self.shape)


@dataclass(frozen=True, eq=False, slots=True)
class _Row:
    """A row of an array: called, its pixels; opened, its bytes."""

    rows: NDArray[Any] | _FileRows
    number: int

    def __call__(self) -> Values:
        return decode_row(self.rows[self.number])

    def open(self) -> BinaryIO:
        return io.BytesIO(self.rows[self.number].tobytes())


def _row_item(name: str, row: _Row, nbytes: int, file: str | None = None, group: str | None = None) -> Item:
    return Item(name, Source(name, nbytes, row.open, file), row, group)


def sample_photographs() -> dict[str, NDArray[np.uint8]]:
    """The two photographs that scikit-learn ships, (427, 640, 3) uint8 each, by name."""
    from sklearn.datasets import load_sample_images

    loaded = load_sample_images()
    return {Path(name).stem: image for name, image in zip(loaded.filenames, loaded.images, strict=True)}


def sample_images() -> list[Item]:
    """The bundled sample: 3,072 patches of 32x32 from both photographs.

    Each photograph is cut into blocks that do not overlap, and a block stays whole in any split, so that no test patch
    shares a pixel with a training patch. Patches of a block do overlap, at offsets that no model's stride divides.
    """
    side, block, offset = 32, 53, 7
    return [
        _row_item(f"{SAMPLE}/{region}/{y:03d}-{x:03d}", _Row(patch[None], 0), patch.nbytes, group=region)
        for name, photograph in sample_photographs().items()
        for top in range(0, photograph.shape[0] - block + 1, block)
        for left in range(0, photograph.shape[1] - block + 1, block)
        for region in [f"{name}/{top}-{left}"]
        for y in range(top, top + block - side + 1, offset)
        for x in range(left, left + block - side + 1, offset)
        for patch in [photograph[y : y + side, x : x + side]]
    ]
