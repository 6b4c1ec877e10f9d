"""SHA-256 of files. It can be begun while other work goes on: hashing and reading leave Python to others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from threading import Thread

CHUNK = 32 << 20
"""Bytes at a time. Between two chunks a thread waits for its turn, so that there must not be many of them."""

State = tuple[Path, int, int, int]
"""What a file's change shows in: its place, inode, length and time of change."""


def file_sha256(path: Path) -> str:
    """Waits for what `hash_ahead` began, unless the file has changed since."""
    begun = _begun.pop(state_of(path), None)
    if begun is not None:
        begun.join()
        if begun.found is not None and state_of(path) == begun.state:
            return begun.found
    return _digest(path)


def hash_ahead(paths: Sequence[Path]) -> None:
    """Begin to hash files whose SHA-256 will be asked for."""
    for path in paths:
        running = _Hashing(path)
        _begun[running.state] = running
        running.start()


class _Hashing(Thread):
    """found: None until it is known, or where the file could not be read; whoever asks then reads it, and says so."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)  # an error that ends the program does not wait for it
        self.state = state_of(path)
        self.found: str | None = None

    def run(self) -> None:
        try:
            self.found = _digest(self.state[0])
        except OSError:
            return


_begun: dict[State, _Hashing] = {}


def state_of(path: Path) -> State:
    its = path.stat()
    return path.absolute(), its.st_ino, its.st_size, its.st_mtime_ns


def _digest(path: Path) -> str:
    # No larger than the file: memory that is taken anew must be cleared first, 32 MB for every small one.
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(CHUNK, max(1, path.stat().st_size))))
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(buffer):
            digest.update(buffer[:length])
    return digest.hexdigest()
