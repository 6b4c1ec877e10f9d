"""A written checkpoint and its index map, held against the original: only what may differ differs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from codebook_tools.checkpoints.config import same_config
from codebook_tools.checkpoints.detect import FoundCodebook, find_codebooks
from codebook_tools.checkpoints.layout import PREFIX, index_map_path
from codebook_tools.checkpoints.reading import Checkpoint, read_checkpoint
from codebook_tools.checkpoints.writing import maps_sha256
from codebook_tools.codebook import REMOVED
from codebook_tools.errors import CodebookError
from codebook_tools.models.companions import companion_values, flags, rows_of
from codebook_tools.models.load import config_key_of


@dataclass(frozen=True)
class Difference:
    """key: the tensor, metadata or config that is not as it must be. what: how, in a few words."""

    key: str
    what: str


@dataclass(frozen=True)
class Verification:
    """differences: empty where the checkpoint is what it says it is."""

    model: str
    against: str
    index_map: str
    differences: tuple[Difference, ...]

    @property
    def ok(self) -> bool:
        return not self.differences

    def to_json(self) -> dict[str, object]:
        """The promised keys."""
        return {"ok": self.ok, "differences": [asdict(difference) for difference in self.differences]}


def verify_checkpoint(model: Path, against: Path, index_map: Path | None = None) -> Verification:
    """Check `model`, written by this package, against the original. index_map: None for the one beside it.

    Raises CodebookError where a file is missing or unsound, or the checkpoint was not written by this package.
    """
    map_path = index_map or index_map_path(model)
    written, original, maps = read_checkpoint(model), read_checkpoint(against), read_checkpoint(map_path)
    key = written.metadata.get(PREFIX + "codebook")
    if key is None:
        raise CodebookError(f"{model} says nothing of a surgery: it was not written by codebook-tools")
    found = {book.key: book for book in find_codebooks(original.shapes, original.dtypes).codebooks}.get(key)
    if found is None:
        if key not in original.entries:
            raise CodebookError(f"{against} has no {key}, the codebook of {model}: it is not the original")
        size, dim = original.entries[key].shape
        found = FoundCodebook(key, size, dim, 0, 1, original.entries[key].dtype, "unknown", (), "high")
    differences = (
        *_files(written, original, maps),
        *_config(written, original, found),
        *_tensors(written, original, found),
        *_maps(written, original, maps, found),
    )
    return Verification(str(model), str(against), str(map_path), differences)


def _files(written: Checkpoint, original: Checkpoint, maps: Checkpoint) -> Iterator[Difference]:
    """The three files belong together, and none was damaged since."""
    if written.metadata.get(PREFIX + "source_sha256") != original.sha256:
        yield Difference("__metadata__", f"{original.path.name} is not the file that the surgery was done on")
    if maps.metadata.get(PREFIX + "checkpoint_sha256") != written.sha256:
        yield Difference(
            "__metadata__", f"{maps.path.name} belongs to another checkpoint, or one of the two is damaged"
        )
    if maps.metadata.get(PREFIX + "data_sha256") != maps_sha256(maps.tensors()):
        yield Difference("__metadata__", f"{maps.path.name} is damaged")
    for name, value in original.metadata.items():
        if not name.startswith(PREFIX) and written.metadata.get(name) != value:
            yield Difference("__metadata__", f"the original's entry {name} was not kept")


def _config(written: Checkpoint, original: Checkpoint, found: FoundCodebook) -> Iterator[Difference]:
    """The config is the original's but for K, which is the tensor's."""
    key = config_key_of(original)
    if (key is None and original.folder is None) or original.config is None:
        return  # none, or one beside the file that may be anyone's
    if written.config is None or written.config_path is None:
        yield Difference("config.json", "missing")
        return
    name, before, after = written.config_path.name, original.config, written.config
    for entry in {**before, **after}:
        same = entry in before and entry in after and same_config(before[entry], after[entry])
        if entry != key and not same:
            yield Difference(name, f"entry {entry} is not the original's")
    shape = written.entries[found.key].shape if found.key in written.entries else ()
    if key is not None and len(shape) > found.axis and after.get(key) != shape[found.axis]:
        yield Difference(name, f"{key} is {after.get(key)!r}, for {shape[found.axis]} codes")


def _tensors(written: Checkpoint, original: Checkpoint, found: FoundCodebook) -> Iterator[Difference]:
    """Keys, dtypes and bytes are the original's but for the codebook, its companions and what was trained."""
    for key in sorted(original.entries.keys() ^ written.entries.keys()):
        yield Difference(key, "missing" if key in original.entries else "not in the original")
    follows = {found.key, *found.companions}
    may_differ = follows | set(flags(found.key, original.entries)) | set(_trained(written))
    for key in sorted(original.entries.keys() & written.entries.keys()):
        before, after = original.entries[key], written.entries[key]
        if before.dtype != after.dtype:
            yield Difference(key, f"dtype {after.dtype} instead of {before.dtype}")
        elif key not in follows and before.shape != after.shape:
            yield Difference(key, f"shape {after.shape} instead of {before.shape}")
        elif key not in may_differ and not _same_bytes(written, original, key):
            yield Difference(key, "changed, though nothing says that it was trained")
        elif key in may_differ and "F" in before.dtype and not bool(torch.isfinite(written.tensor(key).float()).all()):
            yield Difference(key, "not finite")


def _trained(written: Checkpoint) -> list[str]:
    try:
        names = json.loads(written.metadata.get(PREFIX + "trained_tensors", "[]"))
    except ValueError:
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _same_bytes(a: Checkpoint, b: Checkpoint, key: str) -> bool:
    return all(one == other for one, other in zip(a.chunks(key), b.chunks(key), strict=True))


def _maps(written: Checkpoint, original: Checkpoint, maps: Checkpoint, found: FoundCodebook) -> Iterator[Difference]:
    """Sizes agree everywhere, companions follow their codes, and codes that kept their identity kept their numbers."""
    names = (f"{found.key}/index_map", f"{found.key}/nearest")
    if found.key not in written.entries:
        return
    shape = written.entries[found.key].shape
    size = shape[found.axis] if len(shape) > found.axis else -1
    wanted = tuple(size if axis == found.axis else n for axis, n in enumerate(original.entries[found.key].shape))
    if shape != wanted:
        yield Difference(found.key, f"shape {shape}, of which only axis {found.axis} may differ from the original's")
        return
    yield from _companions(written, original, found, size)
    if set(maps.entries) != set(names) or any(maps.entries[n].dtype != "I64" for n in names):
        yield Difference(names[0], f"{maps.path.name} does not hold {names[0]} and {names[1]}, both int64")
        return
    index_map, nearest = (maps.tensor(name) for name in names)
    for name, tensor, least in ((names[0], index_map, REMOVED), (names[1], nearest, 0)):
        if tuple(tensor.shape) != (found.size,):
            yield Difference(name, f"shape {tuple(tensor.shape)} for {found.size} old codes")
            return
        if bool(((tensor < least) | (tensor >= size)).any()):
            yield Difference(name, f"an entry outside {least} to {size - 1}")
            return
    kept = index_map != REMOVED
    if not torch.equal(index_map[kept], nearest[kept]):
        yield Difference(names[1], "a code that kept its identity is not its own nearest")
    done = tuple(written.metadata.get(PREFIX + name) for name in ("command", "kept"))
    if done in {("prune", "surgery"), ("finetune", "before")}:
        old = rows_of(original.tensor(found.key), found)
        new = rows_of(written.tensor(found.key), replace(found, size=size))
        if int(kept.sum()) != size or not torch.equal(new[index_map[kept]], old[kept]):
            yield Difference(found.key, "the codes are not the original's that the index map says were kept")


def _companions(written: Checkpoint, original: Checkpoint, found: FoundCodebook, size: int) -> Iterator[Difference]:
    """What lies beside the codebook belongs to its codes; a tensor that is missing was told of already."""
    flag_keys = flags(found.key, original.entries)
    before = {key: original.tensor(key) for key in (*found.companions, *flag_keys)}
    after = {key: written.tensor(key) for key in before if key in written.entries}
    weights = _weights(after, size)
    codes = rows_of(written.tensor(found.key), replace(found, size=size))
    meant = companion_values(found, before, codes, torch.ones(size) if weights is None else weights)
    for key, tensor in after.items():
        if tensor.shape != meant[key].shape:
            yield Difference(key, f"shape {tuple(tensor.shape)} does not follow {size} codes")
        elif key in flag_keys:
            if not torch.equal(tensor, meant[key]):
                yield Difference(key, "says that the codebook is not initialised")
        elif weights is not None and not torch.allclose(meant[key].double(), tensor.double(), rtol=1e-2, atol=1e-6):
            yield Difference(key, "does not belong to the codes: training would move them at the first step")


def _weights(stored: dict[str, Tensor], size: int) -> Tensor | None:
    """The running counts beside the codebook, where there are some: they are the companions' only free numbers."""
    vectors = [t for key, t in stored.items() if "size" in key or "usage" in key or "count" in key]
    return next((tensor.reshape(-1) for tensor in vectors if tensor.numel() == size), None)
