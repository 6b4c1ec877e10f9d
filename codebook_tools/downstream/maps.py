"""Index maps: what became of each old code, read with suspicion; and the maps of surgeries in a row as one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from codebook_tools.checkpoints.detect import find_codebooks
from codebook_tools.checkpoints.layout import PREFIX, SUFFIX, index_map_path
from codebook_tools.checkpoints.reading import Checkpoint, read_checkpoint
from codebook_tools.checkpoints.writing import maps_sha256
from codebook_tools.codebook import REMOVED
from codebook_tools.errors import CodebookError


@dataclass(frozen=True, eq=False)
class IndexMap:
    """What became of the codes of one codebook.

    index_map: (old size,) int64, the new code where the old one kept its identity or was merged, else REMOVED. nearest:
    (old size,) int64, the new code that stands in for it, which is the same one where there is one. size: of the new
    codebook, None where the model that knows it does not lie beside the map.
    """

    key: str
    index_map: Tensor
    nearest: Tensor
    size: int | None = None

    @property
    def old_size(self) -> int:
        return len(self.index_map)

    @property
    def new_size(self) -> int:
        """Raises CodebookError where it is not known."""
        if self.size is None:
            raise CodebookError(
                f"the number of new codes of {self.key} is not in its map but in the model that was written with it; "
                "put the map beside that model"
            )
        return self.size

    def then(self, later: IndexMap) -> IndexMap:
        """This surgery and a later one of its result, as one. Raises CodebookError where the sizes do not meet."""
        size = self.size or int(self.nearest.max()) + 1
        if size > later.old_size or (self.size and size < later.old_size):
            raise CodebookError(
                f"one map of {self.key} leads to {size} codes and the next starts from {later.old_size}; "
                "give each --map in the order of the surgeries"
            )
        kept = torch.where(self.index_map == REMOVED, REMOVED, later.index_map[self.index_map])
        return IndexMap(self.key, kept, later.nearest[self.nearest], later.size)


@dataclass(frozen=True, eq=False)
class _File:
    """maps: by key. checkpoint: the hash of the model that the maps lead to. source: of the one that it was made from,
    None where that is not known."""

    path: Path
    maps: dict[str, IndexMap]
    checkpoint: str | None
    source: str | None


def read_index_maps(paths: Sequence[Path], keys: Sequence[str] = ()) -> tuple[IndexMap, ...]:
    """The maps of the codebooks `keys`, or of all, in stage order; those of several files composed, in their order.

    Raises CodebookError where a file is no map, is damaged, is of another checkpoint than the one that it lies beside,
    or does not follow on the one before; and where only the user can tell the order of the codebooks.
    """
    files = [_read(path) for path in paths]
    for earlier, later in pairwise(files):
        if later.source is not None and later.source != earlier.checkpoint:
            raise CodebookError(
                f"{later.path} is of another checkpoint: its surgery was not done on the model of {earlier.path}"
            )
    chosen = list(keys) or _in_order(files[0])
    for file in files:
        for key in chosen:
            if key not in file.maps:
                raise CodebookError(f"{file.path} has no map of {key}; it maps {', '.join(file.maps)}")
    return tuple(reduce(IndexMap.then, (file.maps[key] for file in files)) for key in chosen)


def _in_order(file: _File) -> list[str]:
    """Keys that differ in numbers alone are stages in the order of these."""
    if len({re.sub(r"\d+", "#", key) for key in file.maps}) > 1:
        raise CodebookError(
            f"{file.path} maps {', '.join(file.maps)}, whose order the names do not tell; name the one meant with "
            "--codebook-key, or several in their order"
        )
    return sorted(file.maps, key=lambda key: [int(number) for number in re.findall(r"\d+", key)])


def _read(path: Path) -> _File:
    stored = read_checkpoint(path)
    digest = stored.metadata.get(PREFIX + "data_sha256")
    if digest is None:
        raise CodebookError(f"{path} is no index map; codebook-tools writes one beside each model that it writes")
    tensors = stored.tensors()
    if digest != maps_sha256(tensors):
        raise CodebookError(f"{path} is damaged: its numbers are not those that were written")
    checkpoint, model = stored.metadata.get(PREFIX + "checkpoint_sha256"), _model_beside(path)
    if model is not None and model.sha256 != checkpoint:
        raise CodebookError(f"{path} is of another checkpoint than {model.path} beside it, or one of them is damaged")
    sizes, maps = _sizes(model) if model else {}, {}
    for key in sorted(name.removesuffix("/index_map") for name in tensors if name.endswith("/index_map")):
        index_map, nearest = tensors[f"{key}/index_map"], tensors.get(f"{key}/nearest")
        if nearest is None or not _sound(index_map, nearest, sizes.get(key)):
            raise CodebookError(f"{path} is no index map of {key}: its numbers are no codes")
        maps[key] = IndexMap(key, index_map, nearest, sizes.get(key))
    return _File(path, maps, checkpoint, model.metadata.get(PREFIX + "source_sha256") if model else None)


def _sound(index_map: Tensor, nearest: Tensor, size: int | None) -> bool:
    if index_map.ndim != 1 or index_map.shape != nearest.shape or not len(nearest):
        return False
    if index_map.dtype != torch.int64 or nearest.dtype != torch.int64:
        return False
    within = nearest.min() >= 0 and (size is None or nearest.max() < size)
    return bool(within and ((index_map == REMOVED) | (index_map == nearest)).all())


def _sizes(model: Checkpoint) -> dict[str, int]:
    """Codes by key; of a tensor that only the user took for a codebook, rows."""
    rows = {key: shape[0] for key, shape in model.shapes.items() if len(shape) == 2}
    return rows | {book.key: book.size for book in find_codebooks(model.shapes, model.dtypes).codebooks}


def _model_beside(path: Path) -> Checkpoint | None:
    """The model whose map would be called this, a directory or a file."""
    name = path.name.removesuffix(SUFFIX).removesuffix(".index_map")
    for model in (path.with_name(name), path.with_name(name + SUFFIX)):
        if model.exists() and index_map_path(model) == path:
            return read_checkpoint(model)
    return None
