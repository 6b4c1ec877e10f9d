"""Named byte sources in folders, tars and single files: listed without reading, read whole or in part."""

from __future__ import annotations

import io
import os
import posixpath
import re
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
    """Bytes under a name, not read yet.

    Attributes:
        name: Path relative to the folder, tar or file that the user named.
        nbytes: Length, known without reading.
        open: Opens the bytes as a seekable stream.
        file: Path of the file that holds them; None where they are in memory.
        exact: Whether `nbytes` is the length; else it is the mean of several sources.
    """

    name: str
    nbytes: int
    open: Callable[[], BinaryIO] = field(repr=False)
    file: str | None = None
    exact: bool = True

    def read(self) -> bytes:
        """All of the bytes."""
        with self.open() as stream:
            return stream.read()


def file_and_entry(path: Path) -> tuple[Path, str | None]:
    """Split FILE.npz:KEY, FILE.parquet:COLUMN and the like into file and entry; that of any other path is None."""
    parts = None if os.path.lexists(path) else _ENTRY.fullmatch(str(path))  # a name of a file may have a colon
    return (Path(parts[1]), parts[2]) if parts else (path, None)


_ENTRY = re.compile(r"(.+?\.(?:npz|parquet|arrow|feather|safetensors|pt|pth)):(.+)", re.IGNORECASE | re.DOTALL)


def find_sources(path: Path, suffixes: tuple[str, ...]) -> list[Source] | None:
    """List the sources of a path.

    Links are followed. Hidden names (.thumbnails/, or ._x.jpg, in which macOS keeps attributes of a file) are left out.

    Args:
        path: A folder, searched at any depth, an uncompressed .tar, or a file.
        suffixes: Suffixes of the files that count, in lower case.

    Returns:
        The sources; None where the path is a file with another suffix.

    Raises:
        CodebookError: The path is missing or cannot be listed.
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
    """Whether a relative name has one of the suffixes, and no part of it is hidden."""
    hidden = any(part.startswith(".") and part != ".." for part in name.split("/"))
    return name.lower().endswith(suffixes) and not hidden


def _in_folder(folder: Path, suffixes: tuple[str, ...]) -> list[Source]:
    return [
        _whole(name, nbytes, file)
        for file in _files(folder)
        if _counts(name := file.relative_to(folder).as_posix(), suffixes) and (nbytes := _length(file)) is not None
    ]


def _files(folder: Path) -> Iterator[Path]:
    """Files at any depth. Links to folders are followed; a folder that is reached twice counts once."""

    def refuse(error: OSError) -> None:
        raise CodebookError(f"cannot list the folder {error.filename}: {one_line(error)}") from error

    visited = set()
    for top, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(top)
        folders[:] = sorted(name for name in folders if real not in visited and not name.startswith("."))
        yield from (Path(top, name) for name in files if real not in visited)
        visited.add(real)


def _length(file: Path) -> int | None:
    """Bytes of a regular file, else None; 0 for a dangling link, so that reading it reports it by name."""
    try:
        status = file.stat()
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _in_tar(path: Path, suffixes: tuple[str, ...]) -> list[Source]:
    try:
        with tarfile.open(path, "r:") as archive:  # uncompressed only, so that any member can be read by its offset
            # Of a name that a tar holds several times the last member counts, as in unpacking.
            members = {posixpath.normpath(m.name): m for m in archive if m.isfile() or m.islnk() or m.issym()}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise CodebookError(f"{path} is not a readable, uncompressed tar: {error}") from error
    file = str(path)
    return [_member(file, name, members) for name in members if _counts(name, suffixes)]


def _member(file: str, name: str, members: dict[str, tarfile.TarInfo]) -> Source:
    """A member, or the one that it links to: tar stores a file with two names once."""
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
    """`length` bytes of a file from `start` on, as a seekable file."""

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
