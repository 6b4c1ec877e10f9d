"""Hashes of files that are begun ahead: the same as asked for in time, once, and never of what is no longer there."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from conftest import Run

from codebook_tools.checkpoints import hashing
from codebook_tools.checkpoints.hashing import file_sha256, hash_ahead


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are gone through, in order."""
    done, digest = list[Path](), hashing._digest
    monkeypatch.setattr(hashing, "_digest", lambda path: done.append(path) or digest(path))
    return done


def test_a_hash_begun_ahead_is_not_done_again(
    tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "CHUNK", 5)
    for size in (0, 1, 10, 11):
        path, expected = tmp_path / str(size), hashlib.sha256(bytes(range(size))).hexdigest()
        path.write_bytes(bytes(range(size)))
        assert file_sha256(path) == expected
        hash_ahead([path])
        assert file_sha256(path) == expected and hashed.count(path) == 2
        assert file_sha256(path) == expected and hashed.count(path) == 3


def test_a_file_that_changed_or_went_away_since_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    os.utime(path, ns=(0, 0))
    hash_ahead([path])
    path.write_bytes(b"behind")
    assert file_sha256(path) == hashlib.sha256(b"behind").hexdigest()
    hash_ahead([path])
    path.unlink()
    with pytest.raises(FileNotFoundError):
        file_sha256(path)


def test_a_surgery_without_a_network_hashes_its_model_once(tiny: Path, codebook: Run, hashed: list[Path]) -> None:
    assert codebook("quantize", tiny, "--k", 8).exit_code == 0
    assert hashed == [tiny]
