"""Writing checkpoints: atomically, unchanged tensors byte for byte, and read back before a file gets its name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

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
from codebook_tools.checkpoints.hashing import file_sha256, hashed_after, hashed_as_it_grows
from codebook_tools.checkpoints.layout import (
    CARD,
    CONFIG,
    PICKLES,
    PREFIX,
    SUFFIX,
    WEIGHTS,
    index_map_path,
    is_directory_output,
    own_card_path,
    own_config_path,
    partial_path,
    split_others,
)
from codebook_tools.checkpoints.read import Checkpoint, joined_sha256
from codebook_tools.checkpoints.safetensors_file import header_of, laid_out, read_safetensors
from codebook_tools.checkpoints.sealed_file import sealed
from codebook_tools.checkpoints.shards import read_shards
from codebook_tools.checkpoints.tensors import CHUNK, Entry, InMemory, torch_dtype
from codebook_tools.errors import CodebookError, VerificationError


def check_writable(path: Path, force: bool, beside: Iterable[Path] = ()) -> None:
    """Check before hours of work that an output and the files beside it can be written.

    Args:
        path: A .safetensors file, or the name of a directory.
        force: Whether what exists may be replaced.
        beside: What is written beside a file.

    Raises:
        CodebookError: One of the files exists without `force`, or cannot be written.
    """
    as_folder = is_directory_output(path)
    own = () if as_folder else beside
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
                os.lstat(partial_path(target))  # an OSError if the name is too long
            with TemporaryFile(dir=path.parent):  # on Linux it has no name, so that a kill leaves nothing behind
                pass
        if as_folder:
            check_replaceable(path)
    except OSError as error:
        raise CodebookError(
            f"cannot write in {path.parent}: {error.strerror}; write elsewhere with --output"
        ) from error


def tensor_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor as safetensors stores them, little-endian and row by row."""
    return b"".join(InMemory("", tensor).chunks())


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
    """Write a checkpoint with some tensors replaced, and its index map beside it.

    All files are written under temporary names, flushed, read back and compared, then renamed; a directory as one.

    Args:
        original: The checkpoint to change.
        path: A .safetensors file, into which shards are joined, or the name of a directory, which gets weights (shards
            stay shards), config, and the files of the original's directory that are copied with any weights.
        changed: New tensors by key, in the stored dtype; shapes may differ.
        metadata: Added to that of the original under PREFIX.
        maps: int64 tensors of the index map file, by key; no file is written without any.
        config: The text of the config; None where none is written.
        others: The text of other files of the directory by name, where it changes or the file is new; of a file, its
            model card alone, which is written beside it.
        force: Whether what exists is replaced.
        check: Called when all is written and nothing is renamed; if it raises, no file is left.

    Returns:
        The path of the index map.

    Raises:
        VerificationError: What was read back differs from what was written.
        CodebookError: The disk fails, something exists without `force`, or the original has changed since it was read.
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
                target = stack.enter_context(partial_file(map_path, force))
                _write_tensors(target, _in_memory(maps), map_metadata(maps, digest, ours))
            texts = {own_config_path(path): config, own_card_path(path): (others or {}).get(CARD)}
            for own, text in {} if is_directory_output(path) else texts.items():
                if text is not None:
                    beside.append(own)
                    _copy(stack.enter_context(partial_file(own, force)), partial(iter, [text]))
            original.check_unchanged()
            original.check_sha256()
            check()
            # The model comes last, so that it never lies there without its map.
            for target in (*beside, path):
                put_in_place(target)
            sync_folder(path.parent)
    except OSError as error:
        original.check_unchanged()  # the error may come from reading it
        raise CodebookError(f"cannot write {path}: {error.strerror or error}") from error
    return map_path


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, force: bool) -> None:
    """Write a sealed safetensors file atomically and read it back.

    Raises:
        VerificationError: What was read back differs from what was written.
        CodebookError: The disk fails, or the file exists without `force`.
    """
    try:
        with partial_file(path, force) as target:
            _write_tensors(target, _in_memory(tensors), sealed(tensors, metadata))
            put_in_place(path)
    except OSError as error:
        raise CodebookError(f"cannot write {path}: {error.strerror or error}") from error


def write_file(path: Path, chunks: Iterable[bytes], *, force: bool) -> None:
    """Write a file of any kind atomically and read it back; raises as `write_tensors` does."""
    try:
        with partial_file(path, force) as target:
            digest = hashlib.sha256()
            with target.open("wb") as out:
                _write(out, hashed_after(chunks, digest))
            if digest.hexdigest() != file_sha256(target):
                raise VerificationError(f"{path} read back from disk is not what was written; nothing was kept")
            put_in_place(path)
            sync_folder(path.parent)
    except OSError as error:
        raise CodebookError(f"cannot write {path}: {error.strerror or error}") from error


def _in_memory(tensors: Mapping[str, Tensor]) -> list[InMemory]:
    return [InMemory(key, tensor) for key, tensor in sorted(tensors.items())]


def _changed(entries: Mapping[str, Entry], changed: Mapping[str, Tensor]) -> list[Entry]:
    """The entries in their order, those of changed tensors replaced."""
    for key in changed.keys() & entries.keys():
        assert changed[key].dtype == torch_dtype(entries[key].dtype), key
    return [InMemory(key, changed[key]) if key in changed else entry for key, entry in entries.items()]


def _furnish(folder: Path, original: Checkpoint, config: bytes | None, others: Mapping[str, bytes]) -> None:
    """Write all but the weights into a new directory."""
    copied = split_others(original.folder, original.files)[0] if original.folder else []
    texts = {**others} if config is None else {**others, CONFIG: config}
    contents: dict[str, Callable[[], Iterable[bytes]]] = {file.name: partial(_content, file) for file in copied}
    contents |= {name: partial(iter, [text]) for name, text in texts.items()}
    for name, content in contents.items():
        _copy(folder / name, content)


def _weights_name(original: Checkpoint) -> str:
    """The name of the single file of weights in a new directory, such that the library of the original loads it."""
    if original.folder is not None and original.path.suffix == SUFFIX:
        return original.path.name
    of_transformers = original.config and "model_type" in original.config
    return PICKLES.get(original.path.name, WEIGHTS[1] if of_transformers else WEIGHTS[0])


def _write_shards(folder: Path, original: Checkpoint, changed: Mapping[str, Tensor], ours: Mapping[str, str]) -> str:
    """Rewrite the shards with changed tensors or with metadata of ours from before, copy the others, and set the
    index's total size. Returns the joined SHA-256."""
    index, *shards = original.files
    contents = {shard: read_safetensors(shard) for shard in shards}
    rewritten = [
        shard
        for shard, weights in contents.items()
        if changed.keys() & weights.entries.keys() or any(name.startswith(PREFIX) for name in weights.metadata)
    ] or shards[:1]
    digests = {index.name: ""}
    for shard, weights in contents.items():
        target = folder / shard.name
        if shard in rewritten:
            digests[shard.name] = _write_tensors(
                target, _changed(weights.entries, changed), {**weights.metadata, **ours}
            )
        else:
            _copy(target, partial(_content, shard))
            digests[shard.name] = original.digests[shard.name]
    total = sum(entry.nbytes for entry in _changed(original.entries, changed))
    text = with_entries(index.read_bytes(), {"metadata.total_size": total})
    digests[index.name] = _write_whole(folder / index.name, lambda: [text])
    read_shards(folder / index.name)
    return joined_sha256(digests)


def map_metadata(maps: Mapping[str, Tensor], digest: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of an index map file, sealed.

    Args:
        maps: Its tensors, by key.
        digest: SHA-256 of its checkpoint.
        metadata: Of the checkpoint, with PREFIX.
    """
    shared = {name: metadata[name] for name in (PREFIX + "codebooks", PREFIX + "source_sha256") if name in metadata}
    return sealed(maps, {PREFIX + "checkpoint_sha256": digest, **shared})


def maps_sha256(maps: Mapping[str, Tensor]) -> str:
    """SHA-256 of the keys and bytes of several tensors, in whatever order."""
    digest = hashlib.sha256()
    for key, tensor in sorted(maps.items()):
        digest.update(key.encode() + b"\0" + tensor_bytes(tensor))
    return digest.hexdigest()


def _write_tensors(path: Path, entries: Iterable[Entry], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file as `_write_whole` does, and check its header with the library."""
    ordered = laid_out(entries)
    header = header_of(ordered, metadata)
    prologue = (len(header).to_bytes(8, "little"), header)
    digest = _write_whole(path, lambda: chain(prologue, *(entry.chunks() for entry in ordered)))
    read_safetensors(path)
    return digest


def _content(path: Path) -> Iterator[bytes]:
    """The bytes of a file, CHUNK at a time."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _write_whole(path: Path, content: Callable[[], Iterable[bytes]]) -> str:
    """As `_copy`. Returns the SHA-256 of the file: hashing takes longer than all the rest, so nothing waits for it."""
    with path.open("wb") as out, hashed_as_it_grows(path) as sha256:
        _write_compared(out, path, content)
        return sha256()


def _copy(path: Path, content: Callable[[], Iterable[bytes]]) -> None:
    """Write, flush, read back, and compare with the content, which is made twice."""
    with path.open("wb") as out:
        _write_compared(out, path, content)


def _write_compared(out: BinaryIO, path: Path, content: Callable[[], Iterable[bytes]]) -> None:
    """Write; a thread flushes each part, reads it back and compares it while the next one is written."""
    again, count, size = iter(content()), 0, 0

    def check(chunks: int, whole: bool = False) -> None:
        out.flush()
        os.fsync(out.fileno())
        equal = all(back.read(len(chunk)) == chunk for chunk in islice(again, chunks))
        if not equal or (whole and back.read(1)):
            raise VerificationError(f"{path} read back from disk is not what was written; nothing was kept")

    with path.open("rb", buffering=0) as back, ThreadPoolExecutor(1) as checker:
        checks = list[Future[None]]()
        try:
            for chunk in content():
                out.write(chunk)
                count, size = count + 1, size + len(chunk)
                if size >= _PART:
                    checks.append(checker.submit(check, count))
                    count = size = 0
            checks.append(checker.submit(check, count, whole=True))
            for checked in checks:
                checked.result()
        finally:
            checker.shutdown(cancel_futures=True)


_PART = 128 << 20  # bytes


def _write(out: BinaryIO, chunks: Iterable[bytes]) -> None:
    """Write and flush to the disk."""
    out.writelines(chunks)
    out.flush()
    os.fsync(out.fileno())
