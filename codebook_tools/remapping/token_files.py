"""Token files, rewritten in place: the new file is as long as the old one, and only the bytes of ids differ.

Parquet, whose pages are compressed, and lines of JSON have writers of their own.
"""

from __future__ import annotations

import math
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.checkpoints.tensors import Stored
from codebook_tools.errors import CodebookError, one_line
from codebook_tools.remapping.json_lines import CODES, json_records, rewrite_lines
from codebook_tools.remapping.parquet import nested_length, rewrite_parquet
from codebook_tools.remapping.token_choice import choose
from codebook_tools.remapping.token_ids import Translation
from codebook_tools.runtime.safe_io import check_regular

_CHUNK = 1 << 20  # ids, or bytes, at a time
_INTEGERS = {f"{kind.upper()}{8 * width}": f"<{kind}{width}" for kind in "iu" for width in (1, 2, 4, 8)}
"""numpy's dtype by that of safetensors."""


@dataclass(frozen=True)
class Block:
    """An array of ids within a file.

    Attributes:
        name: For messages.
        start: Offset of its first byte in the file.
        dtype: Of its ids, with their byte order.
        shape: Of the array.
        fortran: Whether the first axis runs fastest.
    """

    name: str
    start: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool = False

    def stages(self, axis: int | None, at: NDArray[np.int64]) -> NDArray[np.int64] | int:
        """Position along `axis`, (n,), of the ids at the flat positions `at` (n,); 0 without an axis."""
        if axis is None:
            return 0
        inner = self.shape[:axis] if self.fortran else self.shape[axis + 1 :]
        return at // math.prod(inner) % self.shape[axis]

    def where(self, at: int) -> str:
        """Name and index of the id at a flat position, for messages."""
        place = np.unravel_index(at, self.shape, order="F" if self.fortran else "C")
        return f"{self.name} at [{', '.join(str(i) for i in place)}]"


def rewrite_tokens(path: Path, translation: Translation, keys: Sequence[str], axis: int | None) -> Iterator[bytes]:
    """Translate the ids of a token file.

    Args:
        path: A .npy, .safetensors, .tar, .parquet or .jsonl file.
        translation: From old ids to new ones; it counts them.
        keys: Tensors, columns or endings of members that hold tokens; none for the only ones of integers.
        axis: Which axis runs over the codebooks; None for one codebook.

    Yields:
        The bytes of the new file, in order.

    Raises:
        CodebookError: The file is damaged or cannot be read, or it is not clear what in it holds tokens.
    """
    try:
        check_regular(path)
        if path.suffix == ".parquet":
            yield from rewrite_parquet(path, translation, keys, axis)
            return
        if path.suffix == ".jsonl":
            yield from rewrite_lines(path, translation, keys, axis)
            return
        with path.open("rb") as file:
            for block in BLOCKS[path.suffix](path, keys):
                yield from _copied(file, block.start - file.tell())
                yield from _translated(file, block, translation, axis)
            yield from _copied(file)
    except OSError as error:
        raise CodebookError(f"cannot read {path}: {one_line(error)}") from error


LEVEL_AXIS = 1
"""The axis of the levels in what `encode` writes of several codebooks."""


def has_levels(path: Path, keys: Sequence[str], codebooks: int) -> bool:
    """Whether a file of tokens has the layout of `encode`: along LEVEL_AXIS as many levels as there are codebooks.

    Of a table the first row is looked at.

    Args:
        path: As for `rewrite_tokens`.
        keys: As for `rewrite_tokens`.
        codebooks: Of the map.

    Raises:
        CodebookError: As `rewrite_tokens`.
    """
    try:
        check_regular(path)
        if path.suffix == ".parquet":
            return nested_length(path, keys) == codebooks
        if path.suffix == ".jsonl":
            key = keys[0] if keys else CODES
            first = next((record[key] for _, record in json_records(path, key)), None)
            return isinstance(first, list) and len(first) == codebooks
        return all(block.shape[1:2] == (codebooks,) for block in BLOCKS[path.suffix](path, keys))
    except OSError as error:
        raise CodebookError(f"cannot read {path}: {one_line(error)}") from error


def _copied(file: BinaryIO, left: int | None = None) -> Iterator[bytes]:
    """The next `left` bytes, or all the rest."""
    while chunk := file.read(_CHUNK if left is None else min(left, _CHUNK)):
        left = None if left is None else left - len(chunk)
        yield chunk


def _translated(file: BinaryIO, block: Block, translation: Translation, axis: int | None) -> Iterator[bytes]:
    total = math.prod(block.shape)
    if axis is not None:
        axis = _checked_axis(block, axis, len(translation.maps))
    for first in range(0, total, _CHUNK):
        count = min(_CHUNK, total - first)
        data = file.read(count * block.dtype.itemsize)
        if len(data) < count * block.dtype.itemsize:
            raise CodebookError(f"{block.name} is cut short: its header says {total:,} ids")
        stages = block.stages(axis, np.arange(first, first + count))
        where = lambda i, first=first: block.where(first + i)  # noqa: E731
        yield translation(np.frombuffer(data, block.dtype), stages, where).astype(block.dtype).tobytes()


def _checked_axis(block: Block, axis: int, codebooks: int) -> int:
    if not 0 <= axis < len(block.shape):
        raise CodebookError(f"{block.name} has shape {block.shape} and no axis {axis}; count --axis from 0")
    if block.shape[axis] > codebooks:
        raise CodebookError(
            f"{block.name} has {block.shape[axis]} codebooks along axis {axis} and the map {codebooks}; "
            "is --axis another one?"
        )
    return axis


def _npy_blocks(path: Path, keys: Sequence[str]) -> Iterator[Block]:
    with path.open("rb") as file:
        yield _npy_block(file, str(path), path.stat().st_size)


def _npy_block(file: BinaryIO, name: str, end: int) -> Block:
    """The array whose header starts at the file's position. end: offset after the last byte of the file or member."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, fortran, dtype = readers[np.lib.format.read_magic(file)](file)
    except OSError:
        raise
    except Exception as error:  # numpy raises whatever it likes on a damaged header
        raise CodebookError(f"{name} is not a sound .npy file: {one_line(error)}") from error
    if dtype.kind not in "iu":
        what = "pickled objects, which are never opened" if dtype.hasobject else str(dtype)
        raise CodebookError(f"{name} holds {what}; tokens are integers")
    if file.tell() + math.prod(shape) * dtype.itemsize > end:
        raise CodebookError(f"{name} is cut short: its header says {math.prod(shape):,} ids")
    return Block(name, file.tell(), dtype, shape, fortran)


def _tensor_blocks(path: Path, keys: Sequence[str]) -> Iterator[Block]:
    stored = read_checkpoint(path)
    chosen = choose(path, "tensor", keys, {key: entry.dtype in _INTEGERS for key, entry in stored.entries.items()})
    for key, entry in stored.entries.items():  # in the order of their bytes
        if key in chosen:
            assert isinstance(entry, Stored), path
            yield Block(f"{key} in {path}", entry.start, np.dtype(_INTEGERS[entry.dtype]), entry.shape)


def _member_blocks(path: Path, keys: Sequence[str]) -> Iterator[Block]:
    """Members that end in .npy, or in one of `keys`, as WebDataset names the parts of a sample: `0001.codes.npy`."""
    endings, members = tuple(f".{key.removeprefix('.')}" for key in keys) or (".npy",), 0
    try:
        with tarfile.open(path, "r:") as archive, path.open("rb") as file:
            while member := archive.next():
                archive.members = []  # type: ignore[attr-defined]  # it would keep all of them in memory
                if member.isreg() and member.name.endswith(endings):
                    if member.issparse():  # its bytes are not contiguous
                        raise CodebookError(f"{path}/{member.name} is stored sparse; make the tar without --sparse")
                    file.seek(member.offset_data)
                    yield _npy_block(file, f"{path}/{member.name}", member.offset_data + member.size)
                    members += 1
    except (tarfile.TarError, EOFError) as error:
        raise CodebookError(f"{path} is not a readable, uncompressed tar: {error}") from error
    if not members:
        raise CodebookError(f"{path} has no member that ends in {' or '.join(endings)}; name its tokens with --key")


BLOCKS: Mapping[str, Callable[[Path, Sequence[str]], Iterator[Block]]] = {
    ".npy": _npy_blocks,
    ".safetensors": _tensor_blocks,
    ".tar": _member_blocks,
}
"""By the ending of a file's name, what yields its arrays of ids in the order of their bytes."""

TOKEN_SUFFIXES = {".npy", ".tar", ".parquet", ".jsonl"}
"""Endings of files that hold tokens alone; a .safetensors file may be a prior."""
