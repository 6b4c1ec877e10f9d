"""Checkpoints back on disk: whole or not at all, everything untouched byte for byte, and read back before it counts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from codebook_tools.checkpoints.layout import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    index_map_path,
    is_directory_output,
    own_config_path,
    partial_path,
    split_others,
)
from codebook_tools.checkpoints.places import (
    check_leftovers,
    check_replaceable,
    partial_file,
    partial_folder,
    put_in_place,
    sync_folder,
)
from codebook_tools.checkpoints.reading import Checkpoint, file_sha256, read_checkpoint, torch_dtype
from codebook_tools.errors import CodebookError, VerificationError


def check_writable(path: Path, force: bool, with_config: bool = False) -> None:
    """Raise CodebookError now, not after hours of work, where `path` or what lies beside it cannot be written.

    So it is where one of them exists and `force` is not given. path: a .safetensors file, or the name of a directory.
    with_config: where it is a file, a config is written beside it.
    """
    as_folder = is_directory_output(path)
    own = [own_config_path(path)] if with_config and not as_folder else []
    try:
        if path.is_dir() and not as_folder:
            raise CodebookError(f"{path} is a directory; name a file with --output")
        if not path.parent.is_dir():
            raise CodebookError(f"no such folder: {path.parent}; make it first, or write elsewhere with --output")
        if as_folder:
            check_leftovers(path)
        for target in (path, index_map_path(path), *own):
            if target.exists() and not force:
                raise CodebookError(f"{target} exists; --force replaces it, --output writes elsewhere")
            probe = partial_path(target)
            probe.touch()
            probe.unlink()
        if as_folder:
            check_replaceable(path)
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
    config: bytes | None = None,
    others: Mapping[str, bytes] | None = None,
) -> Path:
    """Write `original` with the tensors of `changed` in their place, its index map beside it; return the map's path.

    path: a .safetensors file, or the name of a directory, which then holds weights, config, and the files of the
    original's directory that go with them. changed: by key, in the stored dtype; shapes may differ. metadata: added
    to the original's, without PREFIX. maps: int64 tensors of the index map file; without any, there is none. config:
    what the config is to hold. others: what other files of the directory are to hold, by name, where that changes.

    Everything is written whole under names that end in `.partial`, flushed, read back and compared, then renamed; a
    directory as one. Raises VerificationError where what was read back is not what was meant, CodebookError where the
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
        with ExitStack() as stack:
            if is_directory_output(path):
                building = stack.enter_context(partial_folder(path))
                weights = _furnish(building, original, config, others or {})
            else:
                weights = stack.enter_context(partial_file(path))
            of_map = {
                PREFIX + "checkpoint_sha256": _write_tensors(weights, header, parts),
                PREFIX + "data_sha256": maps_sha256(maps),
            }
            beside = []
            if maps:
                beside.append(map_path)
                map_parts = [_Part.of(key, "I64", tensor) for key, tensor in sorted(maps.items())]
                _write_tensors(stack.enter_context(partial_file(map_path)), _header(map_parts, of_map), map_parts)
            if config is not None and not is_directory_output(path):
                beside.append(own_config_path(path))
                _write_whole(stack.enter_context(partial_file(beside[-1])), [config])
            # The model last: where there is a model, there is its map.
            for target in (*beside, path):
                put_in_place(target)
            sync_folder(path.parent)
    except OSError as error:
        raise CodebookError(f"cannot write {path}: {error.strerror or error}") from error
    return map_path


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write int64 and float64 tensors into a small file of their own, whole or not at all, and read it back."""
    names = {torch.int64: "I64", torch.float64: "F64"}
    parts = [_Part.of(key, names[tensor.dtype], tensor) for key, tensor in sorted(tensors.items())]
    try:
        with partial_file(path) as target:
            _write_tensors(target, _header(parts, metadata), parts)
            put_in_place(path)
    except OSError as error:
        raise CodebookError(f"cannot write {path}: {error.strerror or error}") from error


def write_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Write any other file, whole or not at all, and read it back."""
    try:
        with partial_file(path) as target:
            _write_whole(target, chunks)
            put_in_place(path)
            sync_folder(path.parent)
    except OSError as error:
        raise CodebookError(f"cannot write {path}: {error.strerror or error}") from error


def _furnish(folder: Path, original: Checkpoint, config: bytes | None, others: Mapping[str, bytes]) -> Path:
    """Write all but the weights into a new directory; return where they belong."""
    if config is not None:
        _write_whole(folder / CONFIG, [config])
    if original.folder is None:
        return folder / WEIGHTS[0]
    for other in split_others(original.folder)[0]:
        _write_whole(folder / other.name, [others.get(other.name) or other.read_bytes()])
    return folder / original.path.name


def maps_sha256(maps: Mapping[str, Tensor]) -> str:
    """Of the names and numbers of an index map file: it carries this itself, so that damage shows."""
    digest = hashlib.sha256()
    for key, tensor in sorted(maps.items()):
        digest.update(key.encode() + b"\0" + tensor_bytes(tensor))
    return digest.hexdigest()


def _write_tensors(path: Path, header: bytes, parts: Sequence[_Part]) -> str:
    """Write a safetensors file as `_write_whole` does, and let its library look at it."""
    prologue = (len(header).to_bytes(8, "little"), header)
    digest = _write_whole(path, chain(prologue, *(part.source() for part in parts)))
    read_checkpoint(path)
    return digest


def _write_whole(path: Path, chunks: Iterable[bytes]) -> str:
    """Write, flush, read back and compare. Returns the SHA-256 of the file."""
    meant = hashlib.sha256()
    with path.open("wb") as out:
        for chunk in chunks:
            out.write(chunk)
            meant.update(chunk)
        out.flush()
        os.fsync(out.fileno())
    if file_sha256(path) != meant.hexdigest():
        raise VerificationError(f"{path} read back from disk is not what was written; nothing was kept")
    return meant.hexdigest()
