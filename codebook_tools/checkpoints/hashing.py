"""SHA-256 in threads, ahead or beside other work: hashing, reading and writing release the interpreter's lock."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Semaphore, Thread

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


def is_hashed_ahead(path: Path) -> bool:
    """Whether hashing a file has begun, and `file_sha256` would have to wait."""
    ahead = _begun.get(state_of(path))
    return ahead is not None and ahead.is_alive()


class _Hashing(Thread):
    """sha256: None until it is known, and where the file could not be read: `file_sha256` then reads it and fails."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)  # so that an error ends the program at once
        self.state = state_of(path)
        self.sha256: str | None = None

    def run(self) -> None:
        with _cores, suppress(OSError):
            self.sha256 = _digest(self.state[0])


_cores = Semaphore(max(1, (os.cpu_count() or 1) - 1))
"""Files that are hashed ahead at a time: the other core imports torch."""

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


@contextmanager
def hashed_as_it_grows(path: Path) -> Iterator[Callable[[], str]]:
    """Hash an empty file, in a thread, while the block writes it from start to end. What ends the block ends that.

    Yields:
        Called once all is written: waits for the SHA-256 in hex, and raises OSError where the file cannot be read.
    """
    written, ended = Event(), Event()

    def follow() -> str:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_FOLLOWED))
        with path.open("rb", buffering=0) as file:
            while not ended.is_set():
                whole = written.is_set()  # asked before reading: nothing is then written behind what is read
                if length := file.readinto(buffer):
                    digest.update(buffer[:length])
                elif whole:
                    break
                else:
                    written.wait(_PAUSE)
        return digest.hexdigest()

    def sha256() -> str:
        written.set()
        return hashed.result()

    with ThreadPoolExecutor(1) as pool:
        hashed = pool.submit(follow)
        try:
            yield sha256
        finally:
            ended.set()


_FOLLOWED = 1 << 20  # bytes at a time, which a core's cache holds
_PAUSE = 0.002  # seconds until it is looked whether more was written


def hashed_after(chunks: Iterable[bytes], digest: hashlib._Hash) -> Iterator[bytes]:
    """The chunks, each of which is hashed while the next one is made and used."""
    with ThreadPoolExecutor(1) as pool:
        hashed: Future[None] | None = None
        for chunk in chunks:
            if hashed is not None:
                hashed.result()  # so that no more than two chunks are in memory
            hashed = pool.submit(digest.update, chunk)
            yield chunk
