"""What is written is hashed while it grows: its own bytes alone, and nothing stays where writing ends early."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Patch, contents
from safetensors import safe_open
from safetensors.torch import save_file
from weight_files import CODEBOOK, NEW, STATE

from codebook_tools.checkpoints import hashing
from codebook_tools.checkpoints import write as write_module
from codebook_tools.checkpoints.hashing import hashed_after, hashed_as_it_grows
from codebook_tools.checkpoints.layout import index_map_path, partial_path
from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.checkpoints.tensors import Stored
from codebook_tools.checkpoints.write import write_checkpoint, write_file
from codebook_tools.errors import CodebookError


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    save_file(STATE, tmp_path / "in" / "model.safetensors")
    return tmp_path / "in" / "model.safetensors"


def write(source: Path, output: Path) -> None:
    write_checkpoint(read_checkpoint(source), output, {CODEBOOK: NEW}, {}, {"map": torch.arange(4)}, force=True)


@pytest.mark.parametrize("size", [0, 1, 4, 5, 6, 23])
def test_the_hash_is_that_of_all_bytes_however_they_come(size: int, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(hashing, "_FOLLOWED", 5)
    content, path = bytes(range(size)), tmp_path / "file"
    with path.open("wb", buffering=0) as out, hashed_as_it_grows(path) as sha256:
        for start in range(0, size, 3):
            threading.Event().wait(3 * hashing._PAUSE)  # the hash has caught up, and sees the end of the file
            out.write(content[start : start + 3])
        assert sha256() == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("chunks", [[], [b"one"], [b"one", b"", b"two", b"three"]])
def test_chunks_pass_and_are_hashed(chunks: list[bytes]) -> None:
    digest = hashlib.sha256()
    assert [*hashed_after(iter(chunks), digest)] == chunks
    assert digest.digest() == hashlib.sha256(b"".join(chunks)).digest()


def test_what_a_killed_run_left_is_not_hashed(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    partial_path(output).write_bytes(bytes(5 << 20))
    write(source, output)
    with safe_open(index_map_path(output), "np") as beside:
        stated = beside.metadata()["codebook_tools.checkpoint_sha256"]
    assert stated == hashlib.sha256(output.read_bytes()).hexdigest()


@pytest.mark.parametrize("read", [1, 2], ids=["while it is written", "while it is read back"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, os.strerror(errno.EIO))])
@pytest.mark.parametrize("output", ["out", "out.safetensors"])
def test_what_ends_writing_leaves_nothing(
    output: str, error: Any, read: int, source: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    last, chunks, reads = [*read_checkpoint(source).entries][-1], Stored.chunks, list[str]()

    def failing(entry: Stored) -> Iterator[bytes]:
        reads.append(entry.key)
        if reads.count(last) == read:
            raise error
        yield from chunks(entry)

    monkeypatch.setattr(Stored, "chunks", failing)
    before = contents(tmp_path)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else CodebookError) as raised:
        write(source, tmp_path / output)
    if error is not KeyboardInterrupt:
        assert str(raised.value) == f"cannot write {tmp_path / output}: Input/output error"
    assert contents(tmp_path) == before


def test_a_file_that_cannot_be_hashed_is_refused_on_one_line(source: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    opened = Path.open

    def failing(path: Path, mode: str = "r", buffering: int = -1, **more: Any) -> Any:
        if buffering == 0 and path.parent == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path, mode, buffering, **more)

    monkeypatch.setattr(Path, "open", failing)
    before = contents(tmp_path)
    with pytest.raises(CodebookError) as raised:
        write(source, tmp_path / "out.safetensors")
    assert str(raised.value) == f"cannot write {tmp_path / 'out.safetensors'}: Input/output error"
    assert contents(tmp_path) == before


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("fault", ["flipped", "disk"])
def test_a_fault_of_any_part_is_noticed(
    fault: str, failing: int, source: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    calls, fsync, before = list[int](), os.fsync, contents(tmp_path)

    def faulty(handle: int) -> None:
        calls.append(handle)
        fsync(handle)
        if len(calls) == failing + 1:
            if fault == "disk":  # which the system reports once
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            os.pwrite(handle, b"\x7f", os.fstat(handle).st_size - 1)

    monkeypatch.setattr(write_module, "_PART", 200)
    monkeypatch.setattr(os, "fsync", faulty)
    with pytest.raises(CodebookError, match="is not what was written" if fault == "flipped" else "Input/output error"):
        write(source, tmp_path / "out.safetensors")
    assert contents(tmp_path) == before


def test_each_part_is_flushed_before_it_is_read_back(source: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    sizes, fsync = list[int](), os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (sizes.append(os.fstat(handle).st_size), fsync(handle))[1])
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    write(source, whole)
    at_once, _ = len(sizes), sizes.clear()
    monkeypatch.setattr(write_module, "_PART", 200)
    write(source, parts)
    assert len(sizes) > at_once and sizes.count(parts.stat().st_size) >= 1
    assert parts.read_bytes() == whole.read_bytes()


def test_a_file_of_chunks_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield b"begun"
        raise KeyboardInterrupt

    write_file(tmp_path / "whole", iter([b"one", b"two"]), force=False)
    assert contents(tmp_path) == {"whole": b"onetwo"}
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "broken", broken(), force=False)
    assert contents(tmp_path) == {"whole": b"onetwo"}
