"""Index maps: what became of each old code, read with suspicion; and the maps of surgeries in a row as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from codebook_tools.checkpoints.layout import PREFIX, SUFFIX, index_map_path
from codebook_tools.checkpoints.read import Checkpoint, read_checkpoint
from codebook_tools.checkpoints.sealed_file import SEAL, Sealed
from codebook_tools.codebook import REMOVED
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.safe_io import parse_json


@dataclass(frozen=True, eq=False)
class IndexMap:
    """What became of the codes of one codebook.

    index_map: (old size,) int64, the new code where the old one kept its identity or was merged, else REMOVED. nearest:
    (old size,) int64, the new code that stands in for it, which is the same one where there is one. size: of the new
    codebook.
    """

    key: str
    index_map: Tensor
    nearest: Tensor
    size: int

    @property
    def old_size(self) -> int:
        return len(self.index_map)

    def then(self, later: IndexMap) -> IndexMap:
        """This surgery and a later one of its result, as one. Raises CodebookError where the sizes do not meet."""
        if self.size != later.old_size:
            raise CodebookError(
                f"one map of {self.key} leads to {self.size} codes and the next starts from {later.old_size}; "
                "give each --map in the order of the surgeries"
            )
        kept = torch.where(self.index_map == REMOVED, REMOVED, later.index_map[self.index_map])
        return IndexMap(self.key, kept, later.nearest[self.nearest], later.size)


@dataclass(frozen=True, eq=False)
class _File:
    """maps: by key, in the order of the stages. checkpoint: the hash of the model that the maps lead to. source: of the
    one that it was made from."""

    path: Path
    maps: dict[str, IndexMap]
    checkpoint: str | None
    source: str | None


def read_index_maps(paths: Sequence[Path], keys: Sequence[str] = ()) -> tuple[IndexMap, ...]:
    """The maps of the codebooks `keys`, or of all, in stage order; those of several files composed, in their order.

    Raises CodebookError where a file is no map, is damaged, is of another checkpoint than the one that it lies beside,
    or does not follow on the one before.
    """
    files = [_read(path) for path in paths]
    for earlier, later in pairwise(files):
        if later.source != earlier.checkpoint:
            raise CodebookError(
                f"{later.path} is of another checkpoint: its surgery was not done on the model of {earlier.path}"
            )
    chosen = list(keys) or list(files[0].maps)
    for file in files:
        for key in chosen:
            if key not in file.maps:
                raise CodebookError(f"{file.path} has no map of {key}; it maps {', '.join(file.maps)}")
    return tuple(reduce(IndexMap.then, (file.maps[key] for file in files)) for key in chosen)


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
    if index_map.ndim != 1 or index_map.shape != nearest.shape or not len(nearest):
        return False
    if index_map.dtype != torch.int64 or nearest.dtype != torch.int64:
        return False
    within = nearest.min() >= 0 and nearest.max() < size
    return bool(within and ((index_map == REMOVED) | (index_map == nearest)).all())


_MOST = 1 << 24
"""Codes of a codebook: sixteen million are more than any has."""


def _sizes(stored: Checkpoint) -> dict[str, int]:
    """New codes by codebook key, in the order of the stages."""
    try:
        sizes = parse_json(stored.metadata.get(PREFIX + "codebooks", ""))
    except ValueError:
        sizes = None
    if not isinstance(sizes, dict) or not sizes or not all(_is_size(size) for size in sizes.values()):
        raise CodebookError(f"{stored.path} is no index map: it does not say how many new codes there are")
    return sizes


def _is_size(said: object) -> bool:
    return type(said) is int and 0 < said <= _MOST


def _model_beside(path: Path) -> Checkpoint | None:
    """The model whose map would be called this, a directory or a file."""
    name = path.name.removesuffix(SUFFIX).removesuffix(".index_map")
    for model in (path.with_name(name), path.with_name(name + SUFFIX)):
        if model.exists() and index_map_path(model) == path:
            return read_checkpoint(model)
    return None
