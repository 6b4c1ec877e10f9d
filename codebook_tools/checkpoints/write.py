"""Checkpoints back on disk: whole or not at all, everything untouched byte for byte, and read back before it counts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile

from torch import Tensor

from codebook_tools.checkpoints.atomic import (
    check_free,
    check_leftovers,
    check_replaceable,
    partial_file,
    partial_folder,
    put_in_place,
    sync_folder,
)
from codebook_tools.checkpoints.config import with_entries
from codebook_tools.checkpoints.hashing import file_sha256
from codebook_tools.checkpoints.layout import (
    CONFIG,
    PREFIX,
    SUFFIX,
    index_map_path,
    is_directory_output,
    own_config_path,
    partial_path,
    split_others,
    written_name,
)
from codebook_tools.checkpoints.read import Checkpoint, joined_sha256
from codebook_tools.checkpoints.safetensors_file import header_of, laid_out, read_safetensors
from codebook_tools.checkpoints.sealed_file import sealed
from codebook_tools.checkpoints.shards import read_shards
from codebook_tools.checkpoints.tensors import CHUNK, Entry, Held, torch_dtype
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
            check_free(target, force)
            with suppress(FileNotFoundError):
                os.lstat(partial_path(target))  # an OSError where the name is too long
            with TemporaryFile(dir=path.parent):  # on Linux it has no name, so that no kill leaves it behind
                pass
        if as_folder:
            check_replaceable(path)
    except OSError as error:
        raise CodebookError(
            f"cannot write in {path.parent}: {error.strerror}; write elsewhere with --output"
        ) from error


def tensor_bytes(tensor: Tensor) -> bytes:
    """Little-endian bytes of a tensor, row by row, as safetensors stores them."""
    return b"".join(Held("", tensor).chunks())


def write_checkpoint(
    original: Checkpoint,
    path: Path,
    changed: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    maps: Mapping[str, Tensor],
    config: bytes | None = None,
    others: Mapping[str, bytes] | None = None,
    *,
    force: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Write `original` with the tensors of `changed` in their place, its index map beside it; return the map's path.

    path: a .safetensors file, which takes all shards, or the name of a directory, which then holds weights, config, and
    the files of the original's directory that go with them; shards stay shards. changed: by key, in the stored dtype;
    shapes may differ. metadata: added to the original's, without PREFIX. maps: int64 tensors of the index map file;
    without any, there is none. config: what the config is to hold. others: what other files of the directory are to
    hold, by name, where that changes or there is none. force: replace what is there. check: called when all is written
    and nothing is in its place yet; what it raises leaves nothing behind.

    Everything is written whole under names that end in `.partial`, flushed, read back and compared, then renamed; a
    directory as one. Raises VerificationError where what was read back is not what was meant, CodebookError where the
    disk fails, something is there to be replaced without `force`, or the original is not what it was when it was read.
    """
    entries = _changed(original.entries, changed)
    ours = {PREFIX + key: value for key, value in metadata.items()}
    map_path = index_map_path(path)
    original.check_unchanged()
    try:
        with ExitStack() as stack:
            if not is_directory_output(path):
                target = stack.enter_context(partial_file(path, force))
                digest = _write_tensors(target, entries, {**original.metadata, **ours})
            else:
                building = stack.enter_context(partial_folder(path, force))
                _furnish(building, original, config, others or {})
                if original.sharded:
                    digest = _write_shards(building, original, changed, ours)
                else:
                    digest = _write_tensors(building / _weights_name(original), entries, {**original.metadata, **ours})
            beside = []
            if maps:
                beside.append(map_path)
                of_maps = [Held(key, tensor) for key, tensor in sorted(maps.items())]
                about = map_metadata(maps, digest, ours)
                _write_tensors(stack.enter_context(partial_file(map_path, force)), of_maps, about)
            if config is not None and not is_directory_output(path):
                beside.append(own_config_path(path))
                _write_whole(stack.enter_context(partial_file(beside[-1], force)), lambda: [config])
            original.check_unchanged()
            check()
            # The model last: where there is a model, there is its map.
            for target in (*beside, path):
                put_in_place(target)
            sync_folder(path.parent)
    except OSError as error:
        original.check_unchanged()  # what is read fails here, too
        raise CodebookError(f"cannot write {path}: {error.strerror or error}") from error
    return map_path


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, force: bool) -> None:
    """Write tensors into a small file of their own, sealed, whole or not at all, and read it back."""
    held = [Held(key, tensor) for key, tensor in sorted(tensors.items())]
    try:
        with partial_file(path, force) as target:
            _write_tensors(target, held, sealed(tensors, metadata))
            put_in_place(path)
    except OSError as error:
        raise CodebookError(f"cannot write {path}: {error.strerror or error}") from error


def write_file(path: Path, chunks: Iterable[bytes], *, force: bool) -> None:
    """Write any other file, whole or not at all, and read it back."""
    try:
        with partial_file(path, force) as target:
            if _write(target, chunks) != file_sha256(target):
                raise VerificationError(f"{path} read back from disk is not what was written; nothing was kept")
            put_in_place(path)
            sync_folder(path.parent)
    except OSError as error:
        raise CodebookError(f"cannot write {path}: {error.strerror or error}") from error


def _changed(entries: Mapping[str, Entry], changed: Mapping[str, Tensor]) -> list[Entry]:
    for key in changed.keys() & entries.keys():
        assert changed[key].dtype == torch_dtype(entries[key].dtype), key
    return [Held(key, changed[key]) if key in changed else entry for key, entry in entries.items()]


def _furnish(folder: Path, original: Checkpoint, config: bytes | None, others: Mapping[str, bytes]) -> None:
    """Write all but the weights into a new directory."""
    if config is not None:
        _write_whole(folder / CONFIG, lambda: [config])
    for other in split_others(original.folder, original.files)[0] if original.folder else ():
        content = partial(_content, other) if other.name not in others else partial(iter, [others[other.name]])
        _write_whole(folder / other.name, content)
    for name in others.keys() - {path.name for path in folder.iterdir()}:
        _write_whole(folder / name, partial(iter, [others[name]]))


def _weights_name(original: Checkpoint) -> str:
    """Of the one file of weights in a new directory."""
    kept = original.folder is not None and original.path.suffix == SUFFIX
    return original.path.name if kept else written_name(original.path, original.config)


def _write_shards(folder: Path, original: Checkpoint, changed: Mapping[str, Tensor], ours: Mapping[str, str]) -> str:
    """Write the shards that hold changed tensors, and what we said of an earlier change; copy the others, and the index
    but for its total. Returns the joined SHA-256."""
    index, *shards = original.files
    found = {shard: read_safetensors(shard) for shard in shards}
    rewritten = [
        shard
        for shard, weights in found.items()
        if changed.keys() & weights.entries.keys() or any(name.startswith(PREFIX) for name in weights.metadata)
    ] or shards[:1]
    digests = {index.name: ""}
    for shard, weights in found.items():
        target = folder / shard.name
        if shard in rewritten:
            digests[shard.name] = _write_tensors(
                target, _changed(weights.entries, changed), {**weights.metadata, **ours}
            )
        else:
            digests[shard.name] = _write_whole(target, partial(_content, shard))
    total = sum(entry.nbytes for entry in _changed(original.entries, changed))
    text = with_entries(index.read_bytes(), {"metadata.total_size": total})
    digests[index.name] = _write_whole(folder / index.name, lambda: [text])
    read_shards(folder / index.name)
    return joined_sha256(digests)


def map_metadata(maps: Mapping[str, Tensor], digest: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """Of an index map file. digest: the SHA-256 of its checkpoint, whose metadata is `metadata`, with PREFIX."""
    shared = {name: metadata[name] for name in (PREFIX + "codebooks", PREFIX + "source_sha256") if name in metadata}
    return sealed(maps, {PREFIX + "checkpoint_sha256": digest, **shared})


def maps_sha256(maps: Mapping[str, Tensor]) -> str:
    """Of the names and numbers of several tensors."""
    digest = hashlib.sha256()
    for key, tensor in sorted(maps.items()):
        digest.update(key.encode() + b"\0" + tensor_bytes(tensor))
    return digest.hexdigest()


def _write_tensors(path: Path, entries: Iterable[Entry], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file as `_write_whole` does, and let its library look at it."""
    ordered = laid_out(entries)
    header = header_of(ordered, metadata)
    prologue = (len(header).to_bytes(8, "little"), header)
    digest = _write_whole(path, lambda: chain(prologue, *(entry.chunks() for entry in ordered)))
    read_safetensors(path)
    return digest


def _content(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _write_whole(path: Path, content: Callable[[], Iterable[bytes]]) -> str:
    """Write, flush, read back and compare with the content once more. Returns the SHA-256 of the file."""
    digest = _write(path, content())
    with path.open("rb") as file:
        if not all(file.read(len(chunk)) == chunk for chunk in content()) or file.read(1):
            raise VerificationError(f"{path} read back from disk is not what was written; nothing was kept")
    return digest


def _write(path: Path, chunks: Iterable[bytes]) -> str:
    """Write and flush. Returns the SHA-256 of what was to be written, which another thread finds out meanwhile."""
    meant = hashlib.sha256()
    with path.open("wb") as out, ThreadPoolExecutor(1) as beside:
        hashed: Future[None] | None = None
        for chunk in chunks:
            if hashed is not None:
                hashed.result()  # before the next, so that few chunks are in memory
            hashed = beside.submit(meant.update, chunk)
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    return meant.hexdigest()
