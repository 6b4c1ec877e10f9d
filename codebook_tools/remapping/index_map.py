"""Index maps: the new code of each old one, read from files that may be damaged, and composed over surgeries."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codebook_tools.checkpoints.detect import find_codebooks
from codebook_tools.checkpoints.layout import PREFIX, SUFFIX, index_map_path
from codebook_tools.checkpoints.read import Checkpoint, read_checkpoint
from codebook_tools.checkpoints.sealed_file import SEAL, Sealed
from codebook_tools.codebook import REMOVED
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.safe_io import parse_json


@dataclass(frozen=True, eq=False)
class IndexMap:
    """The new codes of the old codes of one codebook.

    Attributes:
        key: The codebook's key in the checkpoint.
        index_map: (old size,) int64, the new code where the old one kept its identity or was merged, else REMOVED.
        nearest: (old size,) int64, equal to index_map where that names a code, else the new code nearest to the removed
            one.
        size: Number of new codes.
    """

    key: str
    index_map: Tensor
    nearest: Tensor
    size: int

    @property
    def old_size(self) -> int:
        """Number of old codes."""
        return len(self.index_map)

    def then(self, later: IndexMap) -> IndexMap:
        """Compose this map with that of a later surgery on its result.

        Raises:
            CodebookError: The later map starts from another number of codes.
        """
        if self.size != later.old_size:
            raise CodebookError(
                f"one map of {self.key} leads to {self.size} codes and the next starts from {later.old_size}; "
                "give each --map in the order of the surgeries"
            )
        index_map = torch.where(self.index_map == REMOVED, REMOVED, later.index_map[self.index_map])
        return IndexMap(self.key, index_map, later.nearest[self.nearest], later.size)


@dataclass(frozen=True, eq=False)
class _File:
    """The index maps of one surgery.

    Attributes:
        path: The file.
        maps: By codebook key, in the order of the quantizer stages.
        checkpoint: SHA-256 of the model after the surgery.
        source: SHA-256 of the model before it.
    """

    path: Path
    maps: dict[str, IndexMap]
    checkpoint: str | None
    source: str | None


def read_index_maps(paths: Sequence[Path], keys: Sequence[str] = ()) -> tuple[IndexMap, ...]:
    """Read the index maps of one surgery, or compose those of several.

    Args:
        paths: Files of index maps, in the order of the surgeries.
        keys: Codebooks to read, in this order; none for all, in the order of the quantizer stages. One that no surgery
            was done on, but that the model beside the last map has, stays as it is.

    Returns:
        One map for each codebook.

    Raises:
        CodebookError: A file is no index map, is damaged, belongs to another checkpoint than the one beside it, or does
            not start from the model that the file before leads to; there is no such codebook; or without keys the files
            map different codebooks.
    """
    files = [_read(path) for path in paths]
    for earlier, later in pairwise(files):
        if later.source != earlier.checkpoint:
            raise CodebookError(
                f"{later.path} is of another checkpoint: its surgery was not done on the model of {earlier.path}"
            )
    for file in files:
        if not keys and file.maps.keys() != files[0].maps.keys():
            raise CodebookError(
                f"{file.path} maps {', '.join(file.maps)}, and {files[0].path} {', '.join(files[0].maps)}: name the "
                "codebooks of all levels, in order, with --codebook-key"
            )
    return tuple(_composed(files, key) for key in keys or files[0].maps)


def _composed(files: Sequence[_File], key: str) -> IndexMap:
    """The map of one codebook over all surgeries; those that left it as it was have none of it."""
    maps = [file.maps[key] for file in files if key in file.maps]
    if maps:
        return reduce(IndexMap.then, maps)
    size = codebook_sizes(files[-1].path).get(key)
    if size is None:
        raise CodebookError(f"{files[0].path} has no map of {key}; it maps {', '.join(files[0].maps)}")
    return IndexMap(key, torch.arange(size), torch.arange(size), size)


def codebook_sizes(path: Path) -> dict[str, int]:
    """Number of codes by key of each codebook of the model beside an index map; none where there is no model."""
    model = _model_beside(path)
    return (
        {} if model is None else {book.key: book.size for book in find_codebooks(model.shapes, model.dtypes).codebooks}
    )


def _read(path: Path) -> _File:
    stored = read_checkpoint(path)
    if SEAL not in stored.metadata:
        raise CodebookError(f"{path} is no index map; codebook-tools writes one beside each model that it writes")
    tensors = Sealed(path, stored.entries, stored.metadata, "the same surgery writes it again").tensors()
    checkpoint, model = stored.metadata.get(PREFIX + "checkpoint_sha256"), _model_beside(path)
    if model is not None and model.sha256 != checkpoint:
        raise CodebookError(f"{path} is of another checkpoint than {model.path} beside it, or one of them is damaged")
    maps = {}
    for key, size in _sizes(stored).items():
        index_map, nearest = tensors.get(f"{key}/index_map"), tensors.get(f"{key}/nearest")
        if index_map is None or nearest is None or not _sound(index_map, nearest, size):
            raise CodebookError(f"{path} is no index map of {key}: its numbers are no codes")
        maps[key] = IndexMap(key, index_map, nearest, size)
    return _File(path, maps, checkpoint, stored.metadata.get(PREFIX + "source_sha256"))


def _sound(index_map: Tensor, nearest: Tensor, size: int) -> bool:
    """Whether both are what IndexMap says of them."""
    if index_map.ndim != 1 or index_map.shape != nearest.shape or not len(nearest):
        return False
    if index_map.dtype != torch.int64 or nearest.dtype != torch.int64:
        return False
    within = nearest.min() >= 0 and nearest.max() < size
    return bool(within and ((index_map == REMOVED) | (index_map == nearest)).all())


_MOST_CODES = 1 << 24  # more than any codebook has


def _sizes(stored: Checkpoint) -> dict[str, int]:
    """Number of new codes by codebook key, in the order of the quantizer stages."""
    sizes: Any = None
    with suppress(ValueError):
        sizes = parse_json(stored.metadata.get(PREFIX + "codebooks", ""))
    whole = isinstance(sizes, dict) and all(type(size) is int and 0 < size <= _MOST_CODES for size in sizes.values())
    if not sizes or not whole:
        raise CodebookError(f"{stored.path} is no index map: it does not say how many new codes there are")
    return dict(sizes)


def _model_beside(path: Path) -> Checkpoint | None:
    """The directory or file whose index map would have this name, if there is one."""
    model = model_path(path)
    return None if model is None else read_checkpoint(model)


def model_path(path: Path) -> Path | None:
    """Of the directory or file whose index map would have the name of `path`; None where there is none."""
    name = path.name.removesuffix(SUFFIX).removesuffix(".index_map")
    models = (path.with_name(name), path.with_name(name + SUFFIX))
    return next((model for model in models if model.exists() and index_map_path(model) == path), None)
