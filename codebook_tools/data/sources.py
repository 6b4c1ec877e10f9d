"""Bytes under a name, in folders of any depth, tars and single files: found without reading, read whole or in part."""

from __future__ import annotations

import io
import os
import posixpath
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from codebook_tools.errors import CodebookError, one_line
from codebook_tools.runtime.safe_io import check_regular

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


@dataclass(frozen=True, eq=False, slots=True)  # slots: there are hundreds of thousands of them
class Source:
    """What is stored under one name, not read yet.

    name: its path relative to what was given. nbytes: its length, known without reading. open: its bytes as a stream
    that can be read from any place. file: that they lie in; None where they lie in memory.
    """

    name: str
    nbytes: int
    open: Callable[[], BinaryIO] = field(repr=False)
    file: str | None = None

    def read(self) -> bytes:
        with self.open() as stream:
            return stream.read()


def find_sources(path: Path, suffixes: tuple[str, ...]) -> list[Source] | None:
    """What a folder, a tar or a file holds under names with these endings; None where the path is of no such kind.

    Links are followed. What is hidden (.thumbnails/, or ._x.jpg, in which macOS keeps a file's attributes) does not
    count. Raises CodebookError where the path is missing or cannot be listed.
    """
    try:
        check_regular(path)
        nbytes = path.stat().st_size
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise CodebookError(f"no such file or folder: {path}") from error
        raise CodebookError(f"cannot read {path}: {one_line(error)}") from error
    if path.is_dir():
        return _in_folder(path, suffixes)
    if path.suffix.lower() == ".tar":
        return _in_tar(path, suffixes)
    return [_whole(path.name, nbytes, path)] if path.suffix.lower() in suffixes else None


def _whole(name: str, nbytes: int, path: Path) -> Source:
    file = str(path)
    return Source(name, nbytes, partial(_open, file), file)


def _open(file: str) -> BinaryIO:
    return open(file, "rb")


def _counts(name: str, suffixes: tuple[str, ...]) -> bool:
    """By a name relative to what was given: it ends as it should, and neither it nor a folder of it is hidden."""
    hidden = any(part.startswith(".") and part != ".." for part in name.split("/"))
    return name.lower().endswith(suffixes) and not hidden


def _in_folder(folder: Path, suffixes: tuple[str, ...]) -> list[Source]:
    return [
        _whole(name, nbytes, file)
        for file in _files(folder)
        if _counts(name := file.relative_to(folder).as_posix(), suffixes) and (nbytes := _length(file)) is not None
    ]


def _files(folder: Path) -> Iterator[Path]:
    """Files of any depth. Links to folders are followed, and a folder that is reached twice counts once."""

    def refuse(error: OSError) -> None:
        raise CodebookError(f"cannot list the folder {error.filename}: {one_line(error)}") from error

    seen = set()
    for top, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        place = os.path.realpath(top)
        folders[:] = sorted(name for name in folders if place not in seen and not name.startswith("."))
        yield from (Path(top, name) for name in files if place not in seen)
        seen.add(place)


def _length(file: Path) -> int | None:
    """In bytes; None for what is no file. A link to nothing has 0, so that reading it names it."""
    try:
        status = file.stat()
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _in_tar(path: Path, suffixes: tuple[str, ...]) -> list[Source]:
    try:
        with tarfile.open(path, "r:") as archive:  # uncompressed only, so that any member can be read by its offset
            # A tar may hold a name again: the last one counts.
            members = {posixpath.normpath(m.name): m for m in archive if m.isfile() or m.islnk() or m.issym()}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise CodebookError(f"{path} is not a readable, uncompressed tar: {error}") from error
    file = str(path)
    return [_member(file, name, members) for name in members if _counts(name, suffixes)]


def _member(file: str, name: str, members: dict[str, tarfile.TarInfo]) -> Source:
    """A member, or the one it links to: GNU tar stores a file that has two names once."""
    member = members[name]
    if not member.isfile():
        target = member.linkname if member.islnk() else posixpath.join(posixpath.dirname(name), member.linkname)
        member = members.get(posixpath.normpath(target), member)
    if not member.isfile():
        return Source(
            name, 0, partial(_refuse, f"it is a link to {member.linkname}, which is no file of the tar"), file
        )
    if member.issparse():  # its bytes do not lie in one piece
        return Source(name, 0, partial(_refuse, "it is stored sparse; make the tar without --sparse"), file)
    return Source(name, member.size, partial(_open_range, file, member.offset_data, member.size), file)


def _refuse(why: str) -> BinaryIO:
    raise ValueError(why)


def _open_range(path: str, start: int, length: int) -> BinaryIO:
    return io.BufferedReader(_Range(path, start, length))


class _Range(io.RawIOBase):
    """`length` bytes of a file, from `start` on, as a file of their own."""

    def __init__(self, path: str, start: int, length: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by close)
        self._start, self._length, self._at = start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        self._file.seek(self._start + self._at)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._at)])
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
