"""SHA-256 of files, which may begin ahead in a thread: hashing and reading release the interpreter's lock."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from threading import Thread

CHUNK = 32 << 20
"""Bytes read at a time. Between two chunks a thread waits for the interpreter's lock, so chunks are large and few."""

State = tuple[Path, int, int, int]
"""By which a change of a file is noticed: absolute path, inode, bytes, nanoseconds of the last change."""


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file in hex; that of `hash_ahead`, unless the file has changed since.

    Raises:
        OSError: The file cannot be read.
    """
    ahead = _begun.pop(state_of(path), None)
    if ahead is not None:
        ahead.join()
        if ahead.sha256 is not None and state_of(path) == ahead.state:
            return ahead.sha256
    return _digest(path)


def hash_ahead(paths: Sequence[Path]) -> None:
    """Begin to hash files whose SHA-256 will be asked for.

    Raises:
        OSError: A file is missing.
    """
    for path in paths:
        thread = _Hashing(path)
        _begun[thread.state] = thread
        thread.start()


class _Hashing(Thread):
    """sha256: None until it is known, and where the file could not be read: `file_sha256` then reads it and fails."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)  # so that an error ends the program at once
        self.state = state_of(path)
        self.sha256: str | None = None

    def run(self) -> None:
        try:
            self.sha256 = _digest(self.state[0])
        except OSError:
            return


_begun: dict[State, _Hashing] = {}


def state_of(path: Path) -> State:
    """What a file is now, to be compared with what it is later."""
    status = path.stat()
    return path.absolute(), status.st_ino, status.st_size, status.st_mtime_ns


def _digest(path: Path) -> str:
    # A buffer no larger than the file: clearing 32 MB for every small one would cost more than hashing it.
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(CHUNK, max(1, path.stat().st_size))))
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(buffer):
            digest.update(buffer[:length])
    return digest.hexdigest()
