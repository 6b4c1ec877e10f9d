"""Latents from files in place of images, for which no encoder is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.checkpoints.tensors import Stored, torch_dtype
from codebook_tools.data.items import name_sha256
from codebook_tools.data.latents import all_finite
from codebook_tools.data.sampling import mixed, sample_keys
from codebook_tools.errors import CodebookError, one_line
from codebook_tools.runtime.safe_io import check_regular

_BATCH = 65_536
"""Rows per block; a multiple of 8, as the selected rows are stored as bits."""

Numbers = NDArray[np.int64]
"""(n,) indices of rows of a file."""


@dataclass(frozen=True, eq=False)
class LatentFile:
    """Selected rows of a file.

    Attributes:
        name: Name of the file.
        length: Number of all rows.
        mapped: Maps all rows, (length, dim), into memory: anew at each call, as pages that were read count as memory of
            the process while their mapping lives.
        chosen: uint8; one bit per row, in the order of np.packbits, set where the row is selected.
    """

    name: str
    length: int
    mapped: Callable[[], Tensor]
    chosen: NDArray[np.uint8]

    @cached_property
    def count(self) -> int:
        """Number of selected rows."""
        return sum(map(len, self.blocks()))

    def blocks(self) -> Iterator[Numbers]:
        """Indices of the selected rows in each block of _BATCH rows, ascending; blocks may be empty."""
        for start in range(0, self.length, _BATCH):
            bits = self.chosen[start // 8 : (start + _BATCH) // 8]
            yield start + np.flatnonzero(np.unpackbits(bits))

    def where(self, predicate: Callable[[Numbers], NDArray[np.bool_]]) -> LatentFile:
        """The selected rows whose indices, (n,), a predicate maps to True, (n,)."""
        bits = np.zeros_like(self.chosen)
        for start, numbers in zip(range(0, self.length, _BATCH), self.blocks(), strict=True):
            mask = np.zeros(min(_BATCH, self.length - start), dtype=bool)
            mask[numbers - start] = predicate(numbers)
            bits[start // 8 : (start + _BATCH) // 8] = np.packbits(mask)
        return replace(self, chosen=bits)

    def without(self, other: LatentFile) -> LatentFile:
        """The selected rows that are not selected in `other`."""
        return replace(self, chosen=self.chosen & ~other.chosen)

    def rows(self, numbers: Numbers) -> Tensor:
        """Read rows of one block.

        Args:
            numbers: (n,) ascending indices, at least one.

        Returns:
            (n, dim) float32.

        Raises:
            CodebookError: Names the first row that is not finite.
        """
        first, last = int(numbers[0]), int(numbers[-1])
        rows = self.mapped()[first : last + 1][torch.from_numpy(numbers - first)].float()
        if not all_finite(rows):
            bad = numbers[int(torch.isfinite(rows).all(1).int().argmin())]
            raise CodebookError(f"latent {self.name}#{bad} is not finite")
        return rows

    def hashes(self, numbers: Numbers) -> NDArray[np.uint64]:
        """(n,) hashes of the file's name and the indices, by which rows are sampled."""
        name = int.from_bytes(name_sha256(self.name)[24:], "big")
        return mixed(np.uint64(name) + numbers.astype(np.uint64))

    def is_test(self, numbers: Numbers) -> NDArray[np.bool_]:
        """(n,): whether a row is in the tenth of test rows, by SHA-256 of its name, FILE#number."""
        digests = b"".join([name_sha256(f"{self.name}#{number}") for number in numbers.tolist()])
        tenth: NDArray[np.bool_] = np.frombuffer(digests, dtype=">u8")[::4] % 10 == 0
        return tenth


@dataclass(frozen=True, eq=False)
class FileLatents:
    """Selected rows of several files, in blocks.

    Attributes:
        files: The files, in order.
        part: Index and number of parts: `by_item` gives every n-th block, and other processes the rest.
    """

    files: tuple[LatentFile, ...]
    part: tuple[int, int] = (0, 1)

    def __len__(self) -> int:
        return sum(file.count for file in self.files)

    def by_item(self) -> Iterator[tuple[NDArray[np.uint64], Tensor]]:
        """Hashes of rows, (n,), and their latents, (n, 1, dim) float32, by block.

        Raises:
            CodebookError: Names the first row that is not finite.
        """
        index, parts = self.part
        blocks = ((file, numbers) for file in self.files for numbers in file.blocks() if len(numbers))
        for file, numbers in islice(blocks, index, None, parts):
            yield file.hashes(numbers), file.rows(numbers)[:, None]

    def batches(self, size: int) -> Iterator[tuple[NDArray[np.uint64], Tensor]]:
        """Hashes of rows, (n,), and the rows, (n, dim) float32, by at most `size`.

        Raises:
            CodebookError: Names the first row that is not finite.
        """
        for hashes, latents in self.by_item():
            for start in range(0, len(hashes), size):
                yield hashes[start : start + size], latents[start : start + size, 0]

    def __iter__(self) -> Iterator[Tensor]:
        for _, latents in self.by_item():
            yield latents[:, 0]


def open_latents(paths: Sequence[Path], dim: int) -> FileLatents:
    """Memory-map all rows of `.npy` and `.safetensors` files.

    Args:
        paths: Files with one array (n, dim) of any floating dtype each.
        dim: Dimensions of the codebook's latents.

    Raises:
        CodebookError: A file is missing, of another kind or shape, or two files have one name.
    """
    files = [_file(path, dim) for path in paths]
    names = [file.name for file in files]
    for name in names:
        if names.count(name) > 1:
            raise CodebookError(f"{name} stands twice in --latents: rows are told apart by the name of their file")
    return FileLatents(tuple(files))


def latents_dim(path: Path) -> int | None:
    """Dimensions of the latents in a file; None where its array is no matrix."""
    rows = _mapping(path)()
    return int(rows.shape[1]) if rows.ndim == 2 else None


def _file(path: Path, dim: int) -> LatentFile:
    mapped = _mapping(path)
    rows = mapped()
    if rows.ndim != 2 or rows.shape[1] != dim or not rows.is_floating_point():
        kind = f"{str(rows.dtype).removeprefix('torch.')} {tuple(rows.shape)}"
        raise CodebookError(f"{path} holds {kind}; latents of this codebook are (n, {dim}) of floats")
    return LatentFile(path.name, len(rows), mapped, np.packbits(np.ones(len(rows), dtype=bool)))


def split_latents(latents: FileLatents) -> tuple[FileLatents, FileLatents]:
    """Split into calibration rows and test rows, a tenth by SHA-256 of their names.

    Raises:
        CodebookError: One of the two is empty.
    """
    test = [file.where(file.is_test) for file in latents.files]
    rest = [file.without(test_rows) for file, test_rows in zip(latents.files, test, strict=True)]
    calibration, test_latents = (replace(latents, files=tuple(files)) for files in (rest, test))
    if not len(calibration) or not len(test_latents):
        raise CodebookError(f"{len(latents)} latents leave the calibration or the test split empty; give more")
    return calibration, test_latents


def limited_latents(latents: FileLatents, limit: int | None, seed: int) -> FileLatents:
    """At most `limit` rows, drawn by seed, name of the file and index; all of them where `limit` is None."""
    if limit is None or len(latents) <= limit:
        return latents

    def keys() -> Iterator[NDArray[np.uint64]]:
        for file in latents.files:
            for numbers in file.blocks():
                yield sample_keys(file.hashes(numbers), 1, seed)

    # The limit-th smallest key, without storing all keys: first its upper 16 bits.
    counts = np.cumsum(sum(np.bincount(_upper_bits(block), minlength=1 << 16) for block in keys()))
    upper = int(np.searchsorted(counts, limit))
    candidates = np.concatenate([block[_upper_bits(block) == upper] for block in keys()])
    rank = limit - (int(counts[upper]) - len(candidates)) - 1
    last = np.partition(candidates, rank)[rank]

    def drawn(file: LatentFile, numbers: Numbers) -> NDArray[np.bool_]:
        chosen: NDArray[np.bool_] = sample_keys(file.hashes(numbers), 1, seed) <= last
        return chosen

    return replace(latents, files=tuple(file.where(partial(drawn, file)) for file in latents.files))


def _upper_bits(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (keys >> np.uint64(48)).astype(np.int64)


def _mapping(path: Path) -> Callable[[], Tensor]:
    """A function that maps the only tensor of a file. Raises CodebookError where it holds none, or several."""
    if path.suffix == ".npy":
        return partial(_map_npy, path)
    if path.suffix != ".safetensors":
        raise CodebookError(f"{path} is no file of latents; --latents takes .npy and .safetensors, (n, dim)")
    stored = read_checkpoint(path)
    if len(stored.entries) != 1:
        raise CodebookError(f"{path} holds {len(stored.entries)} tensors; give latents in a file of their own")
    entry = next(iter(stored.entries.values()))
    assert isinstance(entry, Stored)
    return partial(_map_entry, entry)


# Mapped copy-on-write, although nothing is written, because torch warns of read-only arrays.
def _map_entry(entry: Stored) -> Tensor:
    mapped = np.memmap(entry.file, np.uint8, "c", entry.start, (entry.nbytes,))
    return torch.from_numpy(mapped).view(torch_dtype(entry.dtype)).reshape(entry.shape)


def _map_npy(path: Path) -> Tensor:
    try:
        check_regular(path)
        return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    except Exception as error:  # numpy raises whatever it likes on a damaged header
        raise CodebookError(f"cannot read latents from {path}: {one_line(error)}") from error
