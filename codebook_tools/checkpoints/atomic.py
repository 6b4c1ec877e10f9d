"""Building beside a place and moving in: at no moment is the old one lost before the new one is there."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from codebook_tools.checkpoints.layout import PREFIX, aside_path, partial_path
from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.errors import CodebookError


def check_free(path: Path, force: bool) -> None:
    """Raise CodebookError where `path` is there, and `force` does not say that it may be replaced."""
    if os.path.lexists(path) and not force:
        raise CodebookError(f"{path} exists; --force replaces it, or write elsewhere")


def check_apart(written: Iterable[Path], read: Iterable[Path]) -> None:
    """Raise CodebookError where something is to be written that is read: no `force` is meant for that."""
    sources = {os.path.realpath(path) for path in read}
    for path in written:
        if os.path.realpath(path) in sources or any(_is_same(path, its) for its in sources):
            raise CodebookError(f"{path} is read here, so it is never overwritten; write elsewhere")


def _is_same(path: Path, other: str) -> bool:
    """Where a disk takes two spellings for one name, too."""
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


def check_leftovers(path: Path) -> None:
    """Raise CodebookError, with how to recover, where an interrupted run left something beside the directory `path`."""
    old, partial = aside_path(path), partial_path(path)
    if old.exists() and path.exists():
        raise CodebookError(f"{old} is left of an interrupted run that had already written {path.name}; delete it")
    if old.exists():
        raise CodebookError(f"{old} is what an interrupted run was replacing; rename it to {path.name}, or delete it")
    if partial.exists():
        raise _left(partial)


def _left(partial: Path) -> CodebookError:
    return CodebookError(f"{partial} is left of an interrupted run, or another is at work; delete it if none is")


def check_replaceable(path: Path) -> None:
    """Raise CodebookError where `path` is there and is anything but a directory that this package wrote.

    What --force replaces is deleted in the end, and `--output ~ --force` must not be how a home is lost.
    """
    if path.is_symlink() or (path.exists() and not _is_ours(path)):
        raise CodebookError(f"{path} is not a directory that codebook-tools wrote, so it is not replaced; use --output")


def _is_ours(path: Path) -> bool:
    if not path.is_dir() or any(inside.is_dir() for inside in path.iterdir()):
        return False
    try:
        return PREFIX + "codebooks" in read_checkpoint(path).metadata
    except CodebookError:
        return False


@contextmanager
def partial_file(path: Path, force: bool) -> Iterator[Path]:
    """Where to write the file that `path` is to be; removed at the end, unless it was put in place.

    Raises CodebookError where another process is writing it, or has written it and `force` is not given: once this one
    writes, no other does.
    """
    partial = partial_path(path)
    if os.name == "nt":  # what is open there cannot be renamed, nor removed by another
        check_free(path, force)
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)
        return
    with _claimed(partial) as ours:
        try:
            check_free(path, force)
            yield partial
        finally:
            if _is_at(partial, ours):  # not what another began, once this one was in place
                partial.unlink()


@contextmanager
def _claimed(partial: Path) -> Iterator[int]:
    """A lock on a file, which is made where there is none. It goes with the process, so that what a killed one left is
    in nobody's way. Gives the descriptor."""
    import fcntl

    while True:
        file = _opened(partial)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(file)
            raise CodebookError(
                f"{partial} is being written by another process; wait for it, or write elsewhere with --output"
            ) from error
        if _is_at(partial, file):
            break
        os.close(file)  # the other one moved it into place before it let go
    try:
        yield file
    finally:
        os.close(file)


def _opened(partial: Path) -> int:
    """A file of its own, and no link to one that is another's."""
    try:
        file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise _not_ours(partial) from None
        raise
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise _not_ours(partial)
    return file


def _not_ours(partial: Path) -> CodebookError:
    return CodebookError(f"{partial} is no file, so nothing is written there; delete it, or write elsewhere")


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(file))
    except FileNotFoundError:
        return False


@contextmanager
def partial_folder(path: Path, force: bool) -> Iterator[Path]:
    """The same for a directory, which is made here, so that none is removed that another run makes."""
    partial = partial_path(path)
    try:
        partial.mkdir()
    except FileExistsError:
        raise _left(partial) from None
    except OSError as error:
        raise CodebookError(f"cannot write {partial}: {error.strerror}") from error
    try:
        check_free(path, force)
        yield partial
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def put_in_place(path: Path) -> None:
    """Rename the finished partial to `path`. A directory that was there is moved aside first and removed last."""
    partial, old = partial_path(path), aside_path(path)
    if not partial.is_dir():
        os.replace(partial, path)
        return
    sync_folder(partial)
    replaced = path.exists()
    if replaced:
        check_replaceable(path)  # once more: much may have happened since the work began
        os.rename(path, old)
    try:
        os.rename(partial, path)
    except BaseException:
        if replaced:
            os.rename(old, path)
        raise
    sync_folder(path.parent)
    if replaced:
        try:
            shutil.rmtree(old)
        except OSError as error:
            raise CodebookError(f"{path} is written; {old}, which it replaced, cannot be deleted: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file of text, whole or not at all, in a folder that is made; one that is there is replaced. Raises
    CodebookError where the disk fails."""
    try:
        path.parent.mkdir(exist_ok=True)
        with partial_file(path, force=True) as target:
            # Names of files need not be UTF-8, and the locale's encoding need not have what is said.
            target.write_text(text, encoding="utf-8", errors="backslashreplace")
            put_in_place(path)
    except OSError as error:
        raise CodebookError(f"cannot write {path}: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there, and renames are durable without
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
