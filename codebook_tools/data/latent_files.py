"""Latents from files in place of images, for which no encoder is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.checkpoints.tensors import Stored
from codebook_tools.data.array_files import map_entry, map_npy
from codebook_tools.data.rows import Numbers, RowFile, all_finite, limited_rows
from codebook_tools.errors import CodebookError


@dataclass(frozen=True, eq=False)
class LatentFile(RowFile):
    """Selected rows of a file of latents; `mapped` gives (length, dim)."""

    def rows(self, numbers: Numbers) -> Tensor:
        """Read rows of one block.

        Args:
            numbers: (n,) ascending indices, at least one.

        Returns:
            (n, dim) float32.

        Raises:
            CodebookError: Names the first row that is not finite.
        """
        rows = self.stored(numbers).float()
        if not all_finite(rows):
            bad = numbers[int(torch.isfinite(rows).all(1).int().argmin())]
            raise CodebookError(f"latent {self.name}#{bad} is not finite")
        return rows


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
    return LatentFile.whole(path.name, mapped)


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
    return replace(latents, files=limited_rows(latents.files, limit, seed))


def _mapping(path: Path) -> Callable[[], Tensor]:
    """A function that maps the only tensor of a file. Raises CodebookError where it holds none, or several."""
    if path.suffix == ".npy":
        return partial(map_npy, path)
    if path.suffix != ".safetensors":
        raise CodebookError(f"{path} is no file of latents; --latents takes .npy and .safetensors, (n, dim)")
    stored = read_checkpoint(path)
    if len(stored.entries) != 1:
        raise CodebookError(f"{path} holds {len(stored.entries)} tensors; give latents in a file of their own")
    entry = next(iter(stored.entries.values()))
    assert isinstance(entry, Stored)
    return partial(map_entry, entry)
