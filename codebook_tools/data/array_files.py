"""Arrays in files and in memory as items, one a row."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codebook_tools.checkpoints.tensors import Stored, torch_dtype
from codebook_tools.data.items import Item, Values
from codebook_tools.data.sources import Source, file_and_entry
from codebook_tools.errors import CodebookError, one_line
from codebook_tools.runtime.safe_io import check_regular

Decode = Callable[[NDArray[Any]], Values]
"""Converts a stored row to the values of an item; raises ValueError with the reason where it cannot."""


def stored_arrays(path: Path, many: str) -> list[NDArray[Any]]:
    """Read the array of a .npy or .npz file.

    Args:
        path: The file; FILE.npz:KEY where a file holds several arrays.
        many: What its rows are called in messages.

    Returns:
        The array of a .npy file, memory-mapped; that of a .npz file; nothing for a .npz file without any.

    Raises:
        CodebookError: The file cannot be read, holds something else, or several arrays of which none is named.
    """
    file, key = file_and_entry(path)
    try:
        _refuse_bomb(file)
        loaded = np.load(file, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return [loaded]
        with loaded:
            keys = loaded.files
            wanted = [name for name in keys if key in (None, name)]
            arrays = [loaded[name] for name in wanted] if len(wanted) == 1 else []
    except Exception as error:  # numpy and zipfile raise whatever they like on a damaged file
        raise CodebookError(f"{file} is not a readable array file: {one_line(error)}") from error
    if len(wanted) > 1:
        raise CodebookError(f"{file} holds {len(keys)} arrays: {', '.join(keys)}; say which: {file}:{keys[0]}")
    if key is not None and not wanted:
        raise CodebookError(f"{file} holds no array {key}; its arrays: {', '.join(keys) or 'none'}")
    if not all(isinstance(array, np.ndarray) for array in arrays):
        raise CodebookError(f"{file} holds what is no array; give a .npz with an array of {many}, or a .npy")
    return arrays


def _refuse_bomb(path: Path) -> None:
    """Raise ValueError for a .npz that is far longer in memory than on disk, which real data are not."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        packed = sum(member.compress_size for member in archive.infolist())
        whole = sum(member.file_size for member in archive.infolist())
    if whole > max(1 << 30, 200 * packed):
        raise ValueError(f"{packed:,} bytes that unpack to {whole:,} look like a decompression bomb")


# Mapped copy-on-write, although nothing is written, because torch warns of read-only arrays.
def map_npy(path: Path) -> Tensor:
    """Map the array of a .npy file into memory. Raises CodebookError where it holds none of plain numbers."""
    try:
        check_regular(path)
        array = np.load(path, mmap_mode="c", allow_pickle=False)
        if array.dtype.kind not in "fiub":
            raise ValueError(f"its dtype is {array.dtype}; expected floats or integers")
        native = array if array.dtype.isnative else np.array(array, array.dtype.newbyteorder("="))
        return torch.from_numpy(native)
    except Exception as error:  # numpy raises whatever it likes on a damaged header
        raise CodebookError(f"cannot read {path}: {one_line(error)}") from error


def map_entry(entry: Stored) -> Tensor:
    """Map a tensor of a safetensors file into memory."""
    mapped = np.memmap(entry.file, np.uint8, "c", entry.start, (entry.nbytes,))
    return torch.from_numpy(mapped).view(torch_dtype(entry.dtype)).reshape(entry.shape)


def row_items(name: str, array: NDArray[Any], decode: Decode) -> list[Item]:
    """Make one item of each row of an array.

    Args:
        name: Of the array; a row is named NAME#row.
        array: (n, ...); rows of a memory-mapped one are read from the file when they are decoded.
        decode: Converts a row to the values of its item.
    """
    rows: NDArray[Any] | _FileRows = array.view(np.ndarray)
    file = None
    if isinstance(array, np.memmap):
        file = str(array.filename)
        rows = _FileRows(file, array.offset, array.dtype, array.shape[1:]) if array.flags.c_contiguous else rows
    nbytes = array[:1].nbytes

    def item(number: int) -> Item:
        row, row_name = _Row(rows, number, decode), f"{name}#{number}"
        return Item(row_name, Source(row_name, nbytes, row.open, file), row)

    return list(map(item, range(len(array))))


@dataclass(frozen=True, eq=False)
class _FileRows:
    """Rows of an array in a file, read on demand: mapped pages that were touched count as memory of the process."""

    file: str
    start: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __getitem__(self, number: int) -> NDArray[Any]:
        count = math.prod(self.shape)
        offset = self.start + number * count * self.dtype.itemsize
        return np.fromfile(self.file, self.dtype, count, offset=offset).reshape(self.shape)


@dataclass(frozen=True, eq=False, slots=True)
class _Row:
    """A row of an array: calling it gives the values, `open` the bytes."""

    rows: NDArray[Any] | _FileRows
    number: int
    decode: Decode

    def __call__(self) -> Values:
        return self.decode(self.rows[self.number])

    def open(self) -> BinaryIO:
        """The bytes of the row as a stream."""
        return io.BytesIO(self.rows[self.number].tobytes())
