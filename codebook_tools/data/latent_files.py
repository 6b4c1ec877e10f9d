"""Latents from files, in place of images: whatever encoder made them, it need not be here."""

from __future__ import annotations

import hashlib
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
from codebook_tools.data.latents import all_finite
from codebook_tools.data.sampling import mixed, sample_keys
from codebook_tools.errors import CodebookError, one_line
from codebook_tools.runtime.safe_io import check_regular

_BATCH = 65_536
"""Rows that are looked at together; a multiple of 8, for the chosen ones are kept as bits."""

Numbers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LatentFile:
    """Some rows of a file. name: the file's. length: its rows. mapped: all of them, (length, dim), mapped anew at each
    call: pages that were read count as memory of the process while their mapping lives. chosen: which rows, one bit
    each, in np.packbits' order."""

    name: str
    length: int
    mapped: Callable[[], Tensor]
    chosen: NDArray[np.uint8]

    @cached_property
    def count(self) -> int:
        return sum(map(len, self.blocks()))

    def blocks(self) -> Iterator[Numbers]:
        """The numbers of the chosen ones among each _BATCH rows, ascending."""
        for start in range(0, self.length, _BATCH):
            bits = self.chosen[start // 8 : (start + _BATCH) // 8]
            yield start + np.flatnonzero(np.unpackbits(bits))

    def where(self, holds: Callable[[Numbers], NDArray[np.bool_]]) -> LatentFile:
        """Those of the chosen rows whose numbers `holds` is true of."""
        bits = np.zeros_like(self.chosen)
        for start, numbers in zip(range(0, self.length, _BATCH), self.blocks(), strict=True):
            mask = np.zeros(min(_BATCH, self.length - start), dtype=bool)
            mask[numbers - start] = holds(numbers)
            bits[start // 8 : (start + _BATCH) // 8] = np.packbits(mask)
        return replace(self, chosen=bits)

    def without(self, other: LatentFile) -> LatentFile:
        """The chosen rows that are not those of `other`."""
        return replace(self, chosen=self.chosen & ~other.chosen)

    def rows(self, numbers: Numbers) -> Tensor:
        """(n, dim) float32: ascending rows of one block. Raises CodebookError at the first that is not finite."""
        first, last = int(numbers[0]), int(numbers[-1])
        rows = self.mapped()[first : last + 1][torch.from_numpy(numbers - first)].float()
        if not all_finite(rows):
            bad = numbers[int(torch.isfinite(rows).all(1).int().argmin())]
            raise CodebookError(f"latent {self.name}#{bad} is not finite")
        return rows

    def hashes(self, numbers: Numbers) -> NDArray[np.uint64]:
        """(n,): what the rows are drawn by, of the file's name and their numbers."""
        name = hashlib.sha256(_bytes(self.name)).digest()
        return mixed(np.uint64(int.from_bytes(name[24:], "big")) + numbers.astype(np.uint64))

    def is_test(self, numbers: Numbers) -> NDArray[np.bool_]:
        """(n,): whether a row is of the tenth that is only reported on, by SHA-256 of its name, FILE#number."""
        front = hashlib.sha256(_bytes(self.name) + b"#")
        digests = b"".join([_digest(front, number) for number in numbers.tolist()])
        tenth: NDArray[np.bool_] = np.frombuffer(digests, dtype=">u8")[::4] % 10 == 0
        return tenth


def _digest(front: hashlib._Hash, number: int) -> bytes:
    digest = front.copy()
    digest.update(b"%d" % number)
    return digest.digest()


def _bytes(name: str) -> bytes:
    return name.encode(errors="surrogateescape")  # names of files need not be UTF-8


@dataclass(frozen=True, eq=False)
class FileLatents:
    """Rows of files, in blocks. part: which of how many parts of the blocks a pass sees, where others see the rest."""

    files: tuple[LatentFile, ...]
    part: tuple[int, int] = (0, 1)

    def __len__(self) -> int:
        return sum(file.count for file in self.files)

    def by_item(self) -> Iterator[tuple[NDArray[np.uint64], Tensor]]:
        """Hashes of rows, and their latents, (n, 1, dim) float32. CodebookError names the first that is not finite."""
        mine, parts = self.part
        blocks = ((file, numbers) for file in self.files for numbers in file.blocks() if len(numbers))
        for file, numbers in islice(blocks, mine, None, parts):
            yield file.hashes(numbers), file.rows(numbers)[:, None]

    def __iter__(self) -> Iterator[Tensor]:
        for _, latents in self.by_item():
            yield latents[:, 0]


def open_latents(paths: Sequence[Path], dim: int) -> FileLatents:
    """All rows of `.npy` and `.safetensors` files, (n, dim) of any floating dtype, memory-mapped.

    Raises CodebookError where a file is missing, of another kind or shape, or given twice.
    """
    files = [_file(path, dim) for path in paths]
    names = [file.name for file in files]
    for name in names:
        if names.count(name) > 1:
            raise CodebookError(f"{name} stands twice in --latents: rows are told apart by the name of their file")
    return FileLatents(tuple(files))


def latents_dim(path: Path) -> int | None:
    """Dimensions of the latents in a file; None where it holds no rows of them."""
    rows = _mapping(path)()
    return int(rows.shape[1]) if rows.ndim == 2 else None


def _file(path: Path, dim: int) -> LatentFile:
    mapped = _mapping(path)
    rows = mapped()
    if rows.ndim != 2 or rows.shape[1] != dim or not rows.is_floating_point():
        held = f"{str(rows.dtype).removeprefix('torch.')} {tuple(rows.shape)}"
        raise CodebookError(f"{path} holds {held}; latents of this codebook are (n, {dim}) of floats")
    return LatentFile(path.name, len(rows), mapped, np.packbits(np.ones(len(rows), dtype=bool)))


def split_latents(latents: FileLatents) -> tuple[FileLatents, FileLatents]:
    """Calibration rows, and the tenth of them that is only reported on, by SHA-256 of their names.

    Raises CodebookError where one of the two is empty.
    """
    test = [file.where(file.is_test) for file in latents.files]
    rest = [file.without(its) for file, its in zip(latents.files, test, strict=True)]
    calibration, held_out = (replace(latents, files=tuple(files)) for files in (rest, test))
    if not len(calibration) or not len(held_out):
        raise CodebookError(f"{len(latents)} latents leave the calibration or the test split empty; give more")
    return calibration, held_out


def limited_latents(latents: FileLatents, limit: int | None, seed: int) -> FileLatents:
    """At most `limit` rows, drawn by seed, file and number."""
    if limit is None or len(latents) <= limit:
        return latents

    def keys() -> Iterator[NDArray[np.uint64]]:
        for file in latents.files:
            for numbers in file.blocks():
                yield sample_keys(file.hashes(numbers), 1, seed)

    # The limit-th smallest key, without holding them all: first which 16 bits it begins with.
    begin = np.cumsum(sum(np.bincount(_beginning(its), minlength=1 << 16) for its in keys()))
    at = int(np.searchsorted(begin, limit))
    alike = np.concatenate([its[_beginning(its) == at] for its in keys()])
    before = int(begin[at]) - len(alike)
    last = np.partition(alike, limit - before - 1)[limit - before - 1]

    def drawn(file: LatentFile, numbers: Numbers) -> NDArray[np.bool_]:
        chosen: NDArray[np.bool_] = sample_keys(file.hashes(numbers), 1, seed) <= last
        return chosen

    return replace(latents, files=tuple(file.where(partial(drawn, file)) for file in latents.files))


def _beginning(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (keys >> np.uint64(48)).astype(np.int64)


def _mapping(path: Path) -> Callable[[], Tensor]:
    """What maps the tensor of a file. Raises CodebookError where it holds none, or several."""
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


# Copied on write, which nobody does: torch dislikes arrays that cannot be written.
def _map_entry(entry: Stored) -> Tensor:
    mapped = np.memmap(entry.file, np.uint8, "c", entry.start, (entry.nbytes,))
    return torch.from_numpy(mapped).view(torch_dtype(entry.dtype)).reshape(entry.shape)


def _map_npy(path: Path) -> Tensor:
    try:
        check_regular(path)
        return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    except Exception as error:  # numpy raises whatever it likes on a damaged header
        raise CodebookError(f"cannot read latents from {path}: {one_line(error)}") from error
