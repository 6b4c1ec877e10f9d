"""Hashes of files that are begun ahead: the same as asked for in time, and never of what is no longer there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome

from codebook_tools.checkpoints import hashing
from codebook_tools.checkpoints.hashing import file_sha256, hash_ahead


@pytest.mark.parametrize("size", [0, 1, 10, 11])
def test_a_hash_is_that_of_the_bytes_begun_ahead_or_not(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "CHUNK", 5)
    path = tmp_path / "file"
    path.write_bytes(bytes(range(size)))
    meant = hashlib.sha256(bytes(range(size))).hexdigest()
    assert file_sha256(path) == meant
    hash_ahead([path])
    assert file_sha256(path) == meant and file_sha256(path) == meant


def test_what_was_begun_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, done, digest = tmp_path / "file", list[Path](), hashing._digest
    path.write_bytes(b"bytes")
    monkeypatch.setattr(hashing, "_digest", lambda path: done.append(path) or digest(path))
    hash_ahead([path])
    file_sha256(path)
    assert done == [path]


def test_a_file_that_changed_is_hashed_anew(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    os.utime(path, ns=(0, 0))
    hash_ahead([path])
    path.write_bytes(b"behind")
    assert file_sha256(path) == hashlib.sha256(b"behind").hexdigest()


def test_a_file_that_went_away_is_missed_where_its_hash_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"bytes")
    hash_ahead([path])
    path.unlink()
    with pytest.raises(FileNotFoundError):
        file_sha256(path)


def test_a_surgery_by_counts_hashes_its_model_once(
    tiny: Path, codebook: Callable[..., Outcome], images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = tmp_path / "stats.safetensors"
    assert codebook("measure", tiny, "--data", images_folder, "--stats", stats).exit_code == 0
    done, digest = list[Path](), hashing._digest
    monkeypatch.setattr(hashing, "_digest", lambda path: done.append(path) or digest(path))
    assert codebook("prune", tiny, "--stats", stats).exit_code == 0
    assert done == [tiny]
