"""Latents from files, in place of images: whatever encoder made them, it need not be here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codebook_tools.checkpoints.entries import Stored, torch_dtype
from codebook_tools.checkpoints.reading import read_checkpoint
from codebook_tools.errors import CodebookError, one_line
from codebook_tools.latents import Named, sample_keys

_BATCH = 65_536


@dataclass(frozen=True)
class Row:
    """One latent of a file. digest: SHA-256 of its name, FILE#row, as an image's is."""

    name: str

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.name.encode(errors="surrogateescape")).digest()

    @property
    def is_test(self) -> bool:
        """Whether it is of the tenth that is only reported on."""
        return int.from_bytes(self.digest[:8], "big") % 10 == 0


@dataclass(frozen=True, eq=False)
class FileLatents:
    """Rows of memory-mapped files, by file name. chosen: (n,) positions in each, ascending. part: which of how many
    parts of the batches a pass over them sees."""

    files: tuple[tuple[str, Tensor], ...]
    chosen: tuple[NDArray[np.int64], ...]
    part: tuple[int, int] = (0, 1)

    def __len__(self) -> int:
        return sum(map(len, self.chosen))

    def by_item(self) -> Iterator[tuple[Sequence[Named], Tensor]]:
        """Rows and their latents, (n, 1, dim) float32. Raises CodebookError at the first that is not finite."""
        for name, rows, batch in self._own_batches():
            latents = rows[torch.from_numpy(batch)].float()
            finite = torch.isfinite(latents).all(1)
            if not bool(finite.all()):
                raise CodebookError(f"latent {name}#{batch[int(finite.int().argmin())]} is not finite")
            yield [Row(f"{name}#{i}") for i in batch.tolist()], latents[:, None]

    def _own_batches(self) -> Iterator[tuple[str, Tensor, NDArray[np.int64]]]:
        batches = (
            (name, rows, chosen[start : start + _BATCH])
            for (name, rows), chosen in zip(self.files, self.chosen, strict=True)
            for start in range(0, len(chosen), _BATCH)
        )
        return islice(batches, self.part[0], None, self.part[1])

    def __iter__(self) -> Iterator[Tensor]:
        for _, latents in self.by_item():
            yield latents[:, 0]


def open_latents(paths: Sequence[Path], dim: int) -> FileLatents:
    """All rows of `.npy` and `.safetensors` files, (n, dim) of any floating dtype, memory-mapped.

    Raises CodebookError where a file is missing, of another kind or shape, or given twice.
    """
    files = [(path.name, _open(path)) for path in paths]
    names = [name for name, _ in files]
    for path, (name, rows) in zip(paths, files, strict=True):
        if rows.ndim != 2 or rows.shape[1] != dim or not rows.is_floating_point():
            held = f"{str(rows.dtype).removeprefix('torch.')} {tuple(rows.shape)}"
            raise CodebookError(f"{path} holds {held}; latents of this codebook are (n, {dim}) of floats")
        if names.count(name) > 1:
            raise CodebookError(f"{name} stands twice in --latents: rows are told apart by the name of their file")
    return FileLatents(tuple(files), tuple(np.arange(len(rows)) for _, rows in files))


def split_latents(latents: FileLatents) -> tuple[FileLatents, FileLatents]:
    """Calibration rows, and the tenth of them that is only reported on, by SHA-256 of their names.

    Raises CodebookError where one of the two is empty.
    """
    test = [
        np.array([Row(f"{name}#{i}").is_test for i in chosen.tolist()], dtype=bool)
        for (name, _), chosen in zip(latents.files, latents.chosen, strict=True)
    ]
    calibration, held_out = (
        FileLatents(latents.files, tuple(rows[mask == side] for rows, mask in zip(latents.chosen, test, strict=True)))
        for side in (False, True)
    )
    if not len(calibration) or not len(held_out):
        raise CodebookError(f"{len(latents)} latents leave the calibration or the test split empty; give more")
    return calibration, held_out


def limited_latents(latents: FileLatents, limit: int | None, seed: int) -> FileLatents:
    """At most `limit` rows, drawn by seed and name."""
    if limit is None or len(latents) <= limit:
        return latents
    keys = [
        sample_keys([Row(f"{name}#{i}") for i in chosen.tolist()], 1, seed)
        for (name, _), chosen in zip(latents.files, latents.chosen, strict=True)
    ]
    last = np.partition(np.concatenate(keys), limit - 1)[limit - 1]
    return FileLatents(latents.files, tuple(rows[its <= last] for rows, its in zip(latents.chosen, keys, strict=True)))


def _open(path: Path) -> Tensor:
    """Mapped, copied on write, which nobody does: torch dislikes arrays that cannot be written."""
    if path.suffix == ".safetensors":
        stored = read_checkpoint(path)
        if len(stored.entries) != 1:
            raise CodebookError(f"{path} holds {len(stored.entries)} tensors; give latents in a file of their own")
        entry = next(iter(stored.entries.values()))
        assert isinstance(entry, Stored)
        mapped = np.memmap(entry.file, np.uint8, "c", entry.start, (entry.nbytes,))
        return torch.from_numpy(mapped).view(torch_dtype(entry.dtype)).reshape(entry.shape)
    if path.suffix != ".npy":
        raise CodebookError(f"{path} is no file of latents; --latents takes .npy and .safetensors, (n, dim)")
    try:
        return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    except (ValueError, TypeError, OSError, EOFError) as error:
        raise CodebookError(f"cannot read latents from {path}: {one_line(error)}") from error
