"""Files of new tokens: .npy, .safetensors, .parquet and .jsonl, written item by item and renamed when whole."""

from __future__ import annotations

import hashlib
import io
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
from numpy.typing import NDArray

from codebook_tools.checkpoints.atomic import check_free, partial_file, put_in_place, sync_folder
from codebook_tools.checkpoints.layout import PREFIX
from codebook_tools.checkpoints.safetensors_file import header_of
from codebook_tools.checkpoints.tensors import Stored
from codebook_tools.errors import CodebookError, VerificationError
from codebook_tools.remapping.json_lines import CODES, ITEM, json_line
from codebook_tools.remapping.parquet import Sink
from codebook_tools.runtime.optional import require

_ROWS = 1024  # of a row group in parquet
_CHUNK = 1 << 20  # bytes

Levels = Sequence[NDArray[Any]]
"""The tokens of some items, (n, *grid) integers of each quantizer stage."""

Grids = Sequence[tuple[int, ...]]
"""Positions of each quantizer stage, by axis."""


def items_path(tokens: Path) -> Path:
    """Of the names of the items, a line each, beside tokens in .npy or .safetensors."""
    return tokens.with_name(tokens.name + ".items.txt")


def check_token_output(path: Path, force: bool) -> None:
    """Check before any work that tokens can be written.

    Raises:
        CodebookError: The path has an unknown ending, is a directory, lies in no folder, or exists without `force`.
    """
    if path.suffix not in FORMATS:
        raise CodebookError(f"{path} ends in none of {', '.join(FORMATS)}, in which tokens are written")
    if not path.absolute().parent.is_dir():
        raise CodebookError(f"no such folder: {path.parent}; make it first, or write elsewhere with --output")
    for target in (path, *([items_path(path)] if FORMATS[path.suffix].beside else [])):
        if target.is_dir():
            raise CodebookError(f"{target} is a directory; name a file with --output")
        check_free(target, force)


class TokenFormat(ABC):
    """The bytes of a file of tokens.

    Attributes:
        beside: Whether names of items lie in a file of their own.
    """

    beside: ClassVar[bool] = False

    def header(self, items: int) -> bytes:
        """What precedes the tokens: as long for any number of items up to `most`."""
        return b""

    @abstractmethod
    def body(self, names: Sequence[str], levels: Levels) -> bytes:
        """The bytes of some items."""

    def end(self) -> bytes:
        """What follows the tokens."""
        return b""


class _Array(TokenFormat):
    """int32, (n, *grid) of one quantizer stage, or (n, levels, *grid) of several."""

    beside = True

    def __init__(self, grids: Grids, most: int, about: Mapping[str, str]) -> None:
        if len(set(grids)) > 1:
            layouts = ", ".join("x".join(map(str, grid)) for grid in grids)
            raise CodebookError(
                f"the levels have unlike grids, {layouts}, and an array holds one; write .parquet or .jsonl"
            )
        self._row = (*((len(grids),) if len(grids) > 1 else ()), *grids[0])
        self._most, self._about = most, about

    def body(self, names: Sequence[str], levels: Levels) -> bytes:
        rows = np.stack(levels, 1) if len(levels) > 1 else levels[0]
        return rows.astype("<i4").tobytes()


class _Npy(_Array):
    def header(self, items: int) -> bytes:
        # numpy leaves room for the first side to grow, so that this is as long for any number of items.
        buffer = io.BytesIO()
        described = {"descr": "<i4", "fortran_order": False, "shape": (items, *self._row)}
        np.lib.format.write_array_header_1_0(buffer, described)
        return buffer.getvalue()


class _Safetensors(_Array):
    def header(self, items: int) -> bytes:
        header, longest = self._json(items), len(self._json(self._most))
        return longest.to_bytes(8, "little") + header.ljust(longest)

    def _json(self, items: int) -> bytes:
        shape = (items, *self._row)
        stored = Stored(CODES, "I32", shape, Path(), 0, 4 * math.prod(shape))
        return header_of([stored], {PREFIX + name: text for name, text in self._about.items()})


class _JsonLines(TokenFormat):
    def __init__(self, grids: Grids, most: int, about: Mapping[str, str]) -> None:
        self._one = len(grids) == 1

    def body(self, names: Sequence[str], levels: Levels) -> bytes:
        rows = zip(*(level.tolist() for level in levels), strict=True)
        records = ({ITEM: name, CODES: row[0] if self._one else row} for name, row in zip(names, rows, strict=True))
        return "".join(map(json_line, records)).encode()


class _Parquet(TokenFormat):
    """A string and a nested list of int32, in row groups of _ROWS items whatever the size of batches."""

    def __init__(self, grids: Grids, most: int, about: Mapping[str, str]) -> None:
        self._pa = pa = require(".parquet", "parquet", "pyarrow")
        parquet = require(".parquet", "parquet", "pyarrow.parquet")
        self._one, nested = len(grids) == 1, pa.int32()
        for _ in range(len(grids[0]) + (len(grids) > 1)):
            nested = pa.list_(nested)
        metadata = {PREFIX + name: text for name, text in about.items()}
        self._schema = pa.schema([(ITEM, pa.string()), (CODES, nested)], metadata)
        self._sink, self._rows = Sink(), list[tuple[str, Any]]()
        self._writer = parquet.ParquetWriter(pa.PythonFile(self._sink, "w"), self._schema)

    def body(self, names: Sequence[str], levels: Levels) -> bytes:
        rows = zip(*(level.tolist() for level in levels), strict=True)
        self._rows += zip(names, (row[0] if self._one else row for row in rows), strict=True)
        while len(self._rows) >= _ROWS:
            self._write(self._rows[:_ROWS])
            self._rows = self._rows[_ROWS:]
        return self._sink.drained()

    def end(self) -> bytes:
        if self._rows:
            self._write(self._rows)
        self._writer.close()
        return self._sink.drained()

    def _write(self, rows: Sequence[tuple[str, Any]]) -> None:
        columns = [[row[i] for row in rows] for i in range(2)]
        self._writer.write_table(
            self._pa.Table.from_pydict(dict(zip((ITEM, CODES), columns, strict=True)), self._schema)
        )


FORMATS: Mapping[str, type[Any]] = {
    ".npy": _Npy,
    ".safetensors": _Safetensors,
    ".parquet": _Parquet,
    ".jsonl": _JsonLines,
}
"""By the ending of a file's name."""


class TokenWriter:
    """Takes the tokens of some items after another. Made by `writing_tokens`.

    Attributes:
        items: Written so far.
        grids: Of each quantizer stage, by the first items; None before them.
        ragged: Whether items have unlike grids.
        tokens: Written so far, of all stages.
    """

    def __init__(
        self, tokens: BinaryIO, names: BinaryIO | None, make: type[Any], most: int, about: Mapping[str, str]
    ) -> None:
        self._file, self._names, self._make, self._most, self._about = tokens, names, make, most, about
        self._format: TokenFormat | None = None
        self._digest = hashlib.sha256()
        self.items = self.tokens = 0
        self.ragged = False
        self.grids: tuple[tuple[int, ...], ...] | None = None

    def add(self, names: Sequence[str], levels: Levels) -> None:
        """Append items.

        Args:
            names: Of n items, each on one line.
            levels: (n, *grid) integers of each quantizer stage; grids may differ in length from those of items before.

        Raises:
            CodebookError: The format does not hold these grids.
            OSError: The disk fails.
        """
        if self._format is None:
            self.grids = tuple(level.shape[1:] for level in levels)
            self._format = self._make(self.grids, self._most, self._about)
            self._file.write(self._format.header(self._most))
        grids = tuple(level.shape[1:] for level in levels)
        if grids != self.grids:
            if self._names is not None:
                raise CodebookError(
                    f"{names[0]} has tokens of {_by(grids)}, and items before it of {_by(self.grids or ())}: rows of "
                    "unlike length are written as .parquet or .jsonl"
                )
            self.ragged = True
        self.tokens += sum(level.size for level in levels)
        self._write(self._format.body(names, levels))
        if self._names:
            self._names.write("".join(f"{name}\n" for name in names).encode())
        self.items += len(names)

    def finish(self, path: Path) -> None:
        """Write what comes last, flush, and read back. path: of the file.

        Raises:
            VerificationError: What was read back differs from what was written.
            OSError: The disk fails.
        """
        assert self._format is not None, "no items"
        self._write(self._format.end())
        header = self._format.header(self.items)
        self._file.seek(0)
        self._file.write(header)
        for file in filter(None, (self._file, self._names)):
            file.flush()
            os.fsync(file.fileno())
        digest = hashlib.sha256()
        with path.open("rb") as file:
            sound = file.read(len(header)) == header
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        if not sound or digest.digest() != self._digest.digest():
            raise VerificationError(f"{path} read back from disk is not what was written; nothing was kept")

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)


def _by(grids: Sequence[Sequence[int]]) -> str:
    return " + ".join(dict.fromkeys("x".join(map(str, grid)) or "1" for grid in grids))


@contextmanager
def writing_tokens(path: Path, most: int, about: Mapping[str, str], *, force: bool) -> Iterator[TokenWriter]:
    """Write a file of tokens atomically, and the names of its items where it has no room for them.

    Memory does not grow with the number of items. Both files get their names when the context ends without an error.

    Args:
        path: Ends in one of FORMATS.
        most: Items at most.
        about: Metadata by name, kept by .safetensors and .parquet.
        force: Whether to replace files.

    Raises:
        CodebookError: A file exists without `force`, another process writes it, or the disk fails.
    """
    make = FORMATS[path.suffix]
    targets = [path, *([items_path(path)] if make.beside else [])]
    try:
        with ExitStack() as stack:
            partials = [stack.enter_context(partial_file(target, force)) for target in targets]
            with ExitStack() as files:
                opened = [files.enter_context(partial.open("wb")) for partial in partials]
                writer = TokenWriter(opened[0], opened[1] if make.beside else None, make, most, about)
                yield writer
                writer.finish(partials[0])
            for target in reversed(targets):  # the tokens last: they never lie there without the names
                put_in_place(target)
            sync_folder(path.absolute().parent)
    except OSError as error:
        raise CodebookError(f"cannot write {path}: {error.strerror or error}") from error
