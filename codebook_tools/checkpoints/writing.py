"""Checkpoints back on disk: whole or not at all, everything untouched byte for byte, and read back before it counts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from codebook_tools.checkpoints.reading import Checkpoint, file_sha256, read_checkpoint, torch_dtype
from codebook_tools.errors import CodebookError, VerificationError

PREFIX = "codebook_tools."
"""Of the metadata that we add."""


def index_map_path(model: Path) -> Path:
    return model.with_name(f"{model.stem}.index_map.safetensors")


def partial_path(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def check_writable(path: Path, force: bool) -> None:
    """Raise CodebookError now, not after hours of work, where `path` or its index map cannot be written.

    So it is where one of the two exists and `force` is not given.
    """
    try:
        if path.is_dir():
            raise CodebookError(f"{path} is a directory; name a file with --output")
        if not path.parent.is_dir():
            raise CodebookError(f"no such folder: {path.parent}; make it first, or write elsewhere with --output")
        for target in (path, index_map_path(path)):
            if target.exists() and not force:
                raise CodebookError(f"{target} exists; --force replaces it, --output writes elsewhere")
            probe = partial_path(target)
            probe.touch()
            probe.unlink()
    except OSError as error:
        raise CodebookError(
            f"cannot write in {path.parent}: {error.strerror}; write elsewhere with --output"
        ) from error


def tensor_bytes(tensor: Tensor) -> bytes:
    """Little-endian bytes of a tensor, row by row, as safetensors stores them."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return b"" if flat.numel() == 0 else flat.view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class _Part:
    """A tensor to be written: its header entry, and its bytes, to be read as often as asked for."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source: Callable[[], Iterable[bytes]]

    @staticmethod
    def of(key: str, dtype: str, tensor: Tensor) -> _Part:
        data = tensor_bytes(tensor)
        return _Part(key, dtype, tuple(tensor.shape), len(data), lambda: [data])


def _header(parts: Sequence[_Part], metadata: Mapping[str, str]) -> bytes:
    """Entries in sorted order, so that the same content gives the same bytes; padded to 8 bytes, as the format asks."""
    # transformers of 2024 fails where "format" is missing.
    header: dict[str, object] = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    entries, offset = {}, 0
    for part in parts:
        span = [offset, offset + part.nbytes]
        entries[part.key] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": span}
        offset += part.nbytes
    header.update(sorted(entries.items()))
    data = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return data + b" " * (-len(data) % 8)


def write_checkpoint(
    original: Checkpoint,
    path: Path,
    changed: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    maps: Mapping[str, Tensor],
) -> Path:
    """Write `original` with the tensors of `changed` in their place, its index map beside it; return the map's path.

    changed: by key, in the stored dtype; shapes may differ. metadata: added to the original's, without PREFIX. maps:
    int64 tensors of the index map file. Both files are written whole to `.partial`, flushed, read back and compared,
    then renamed. Raises VerificationError where what was read back is not what was meant, CodebookError where the
    disk fails.
    """
    parts = []
    for key, entry in original.entries.items():
        if key in changed:
            assert changed[key].dtype == torch_dtype(entry.dtype), key
            parts.append(_Part.of(key, entry.dtype, changed[key]))
        else:
            source = partial(original.chunks, key)
            parts.append(_Part(key, entry.dtype, entry.shape, entry.end - entry.start, source))
    header = _header(parts, {**original.metadata, **{PREFIX + key: value for key, value in metadata.items()}})
    map_path = index_map_path(path)
    try:
        of_map = {
            PREFIX + "checkpoint_sha256": _write_partial(path, header, parts),
            PREFIX + "data_sha256": maps_sha256(maps),
        }
        map_parts = [_Part.of(key, "I64", tensor) for key, tensor in sorted(maps.items())]
        _write_partial(map_path, _header(map_parts, of_map), map_parts)
        # The map first: where there is a model, there is its map.
        for target in (map_path, path):
            os.replace(partial_path(target), target)
        _sync_folder(path.parent)
    except OSError as error:
        raise CodebookError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        for target in (map_path, path):
            partial_path(target).unlink(missing_ok=True)
    return map_path


def maps_sha256(maps: Mapping[str, Tensor]) -> str:
    """Of the names and numbers of an index map file: it carries this itself, so that damage shows."""
    digest = hashlib.sha256()
    for key, tensor in sorted(maps.items()):
        digest.update(key.encode() + b"\0" + tensor_bytes(tensor))
    return digest.hexdigest()


def _write_partial(path: Path, header: bytes, parts: Sequence[_Part]) -> str:
    """Write to `.partial`, flush, read back and compare. Returns the SHA-256 of the file."""
    target, meant = partial_path(path), hashlib.sha256()
    with target.open("wb") as out:
        for chunk in chain((len(header).to_bytes(8, "little"), header), *(part.source() for part in parts)):
            out.write(chunk)
            meant.update(chunk)
        out.flush()
        os.fsync(out.fileno())
    if file_sha256(target) != meant.hexdigest():
        raise VerificationError(f"{path} read back from disk is not what was written; nothing was kept")
    read_checkpoint(target)
    return meant.hexdigest()


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there, and renames are durable without
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
