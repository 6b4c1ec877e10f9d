"""Atomic writing: a locked temporary name, then a rename; what is replaced stays until the new one is whole."""

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
    """Check that nothing is replaced without permission.

    Raises:
        CodebookError: `path` exists, a dangling link included, and `force` is False.
    """
    if os.path.lexists(path) and not force:
        raise CodebookError(f"{path} exists; --force replaces it, or write elsewhere")


def check_apart(written: Iterable[Path], read: Iterable[Path]) -> None:
    """Check that no output is also an input, under whatever spelling or link: `--force` does not permit that.

    Raises:
        CodebookError: A path of `written` is one of `read`.
    """
    sources = {os.path.realpath(path) for path in read}
    for path in written:
        if os.path.realpath(path) in sources or any(_is_same(path, source) for source in sources):
            raise CodebookError(f"{path} is read here, so it is never overwritten; write elsewhere")


def _is_same(path: Path, other: str) -> bool:
    """Whether both are one file, also where the file system ignores case or normalizes Unicode."""
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


def check_leftovers(path: Path) -> None:
    """Check that no interrupted run left anything beside the directory `path`.

    Raises:
        CodebookError: Something is left; the message says how to recover.
    """
    old, partial = aside_path(path), partial_path(path)
    if old.exists() and path.exists():
        raise CodebookError(f"{old} is left of an interrupted run that had already written {path.name}; delete it")
    if old.exists():
        raise CodebookError(f"{old} is what an interrupted run was replacing; rename it to {path.name}, or delete it")
    if partial.exists():
        raise _leftover_error(partial)


def _leftover_error(partial: Path) -> CodebookError:
    return CodebookError(f"{partial} is left of an interrupted run, or another is at work; delete it if none is")


def check_replaceable(path: Path) -> None:
    """Check that what --force would replace may be deleted: `--output ~ --force` must not cost anybody a home.

    Raises:
        CodebookError: `path` exists and is anything but a directory that this package wrote.
    """
    if path.is_symlink() or (path.exists() and not _is_ours(path)):
        raise CodebookError(f"{path} is not a directory that codebook-tools wrote, so it is not replaced; use --output")


def _is_ours(path: Path) -> bool:
    """Whether it is a directory that this package wrote: without folders, its weights with our metadata."""
    if not path.is_dir() or any(inside.is_dir() for inside in path.iterdir()):
        return False
    try:
        return PREFIX + "codebooks" in read_checkpoint(path).metadata
    except CodebookError:
        return False


@contextmanager
def partial_file(path: Path, force: bool) -> Iterator[Path]:
    """Give the temporary name under which the file `path` is written; call `put_in_place` once it is whole.

    The name is locked, so that no other process writes there meanwhile; on exit it is removed unless it was renamed.

    Raises:
        CodebookError: Another process is writing the file, or the file exists and `force` is False.
    """
    partial = partial_path(path)
    if os.name == "nt":  # an open file can be neither renamed there, nor removed by another process
        check_free(path, force)
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)
        return
    with _locked(partial) as descriptor:
        try:
            check_free(path, force)
            yield partial
        finally:
            if _is_at(partial, descriptor):  # after the rename another process may have begun a file of that name
                partial.unlink()


@contextmanager
def _locked(partial: Path) -> Iterator[int]:
    """Make the file if need be, lock it, and give its descriptor.

    The lock ends with the process, so that what a killed one left hinders nobody.
    """
    import fcntl

    while True:
        descriptor = _open_regular(partial)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise CodebookError(
                f"{partial} is being written by another process; wait for it, or write elsewhere with --output"
            ) from error
        if _is_at(partial, descriptor):
            break
        os.close(descriptor)  # its writer renamed it into place between our opening and our locking it
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open_regular(partial: Path) -> int:
    """Open a regular file, made where there is none, and follow no link to anybody else's."""
    irregular = CodebookError(f"{partial} is no file, so nothing is written there; delete it, or write elsewhere")
    try:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise irregular from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise irregular
    return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def partial_folder(path: Path, force: bool) -> Iterator[Path]:
    """Make the directory under whose temporary name the directory `path` is built; as `partial_file` otherwise.

    Raises:
        CodebookError: The temporary directory exists (it may be another process's, so it is not removed) or cannot be
            made, or `path` exists and `force` is False.
    """
    partial = partial_path(path)
    try:
        partial.mkdir()
    except FileExistsError:
        raise _leftover_error(partial) from None
    except OSError as error:
        raise CodebookError(f"cannot write {partial}: {error.strerror}") from error
    try:
        check_free(path, force)
        yield partial
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def put_in_place(path: Path) -> None:
    """Rename the finished temporary file or directory of `path` to `path`.

    A directory that is replaced is first renamed aside, and deleted last.

    Raises:
        CodebookError: The directory to replace is not of this package, or cannot be deleted once it is replaced.
        OSError: As renaming does; a directory that was moved aside is then moved back.
    """
    partial, old = partial_path(path), aside_path(path)
    if not partial.is_dir():
        os.replace(partial, path)
        return
    sync_folder(partial)
    replaced = path.exists()
    if replaced:
        check_replaceable(path)  # once more: hours may have passed since the first check
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
    """Write or replace a UTF-8 text file atomically; its folder is made if need be.

    Raises:
        CodebookError: The disk fails, or another process is writing the file.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        with partial_file(path, force=True) as target:
            # File names in the text need not be UTF-8, and the locale's encoding may lack characters of it.
            target.write_text(text, encoding="utf-8", errors="backslashreplace")
            put_in_place(path)
    except OSError as error:
        raise CodebookError(f"cannot write {path}: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Flush a directory's entries to disk, so that a rename in it survives a power failure."""
    if os.name == "nt":  # directories cannot be opened there, and renames are durable without
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
