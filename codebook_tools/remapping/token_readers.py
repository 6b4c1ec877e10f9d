"""Files of tokens, read item by item in batches: level by level, with the names of items where there are some."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codebook_tools.checkpoints.layout import PREFIX
from codebook_tools.checkpoints.safetensors_file import read_safetensors
from codebook_tools.errors import CodebookError, one_line
from codebook_tools.remapping.json_lines import CODES, ITEM, json_records
from codebook_tools.remapping.parquet import holds_integers, open_table
from codebook_tools.remapping.token_choice import choose
from codebook_tools.remapping.token_files import BLOCKS
from codebook_tools.remapping.token_writers import FORMATS, items_path
from codebook_tools.runtime.safe_io import check_regular

Batch = tuple[list[str], list[NDArray[np.int64]]]
"""Names of n items, and their tokens, (n, *grid) of each level."""


@dataclass(frozen=True)
class TokenFile:
    """Tokens in a file that `encode` wrote, or in one of the same layout.

    Attributes:
        path: Of the file.
        items: How many it holds.
        about: The metadata that `encode` left, by name; empty in formats that have none.
        named: Whether the file, or the one beside it, names the items.
    """

    path: Path
    items: int
    about: Mapping[str, str] = field(default_factory=dict)
    named: bool = False

    def batches(self, levels: int, size: int) -> Iterator[Batch]:
        """Read the items in order, those of one layout together.

        Args:
            levels: Of the model; several are the second axis of an array, or the outermost list of a row.
            size: Items of a batch at most.

        Raises:
            CodebookError: The file is damaged, or has another number of levels.
        """
        try:
            rows = self._arrays(levels, size) if self.path.suffix in BLOCKS else self._lists(levels, size)
            yield from rows
        except OSError as error:
            raise CodebookError(f"cannot read {self.path}: {one_line(error)}") from error

    def _arrays(self, levels: int, size: int) -> Iterator[Batch]:
        (block,) = BLOCKS[self.path.suffix](self.path, ())
        if levels > 1 and block.shape[1:2] != (levels,):
            has = f"{block.shape[1]} along axis 1" if len(block.shape) > 1 else "one axis"
            raise CodebookError(
                f"{block.name} has shape {block.shape}, so {has}, and the model has {levels} levels: expected (n, "
                f"{levels}, ...)"
            )
        order: Any = "F" if block.fortran else "C"
        names = self._names()
        for start in range(0, self.items, size):
            # Mapped anew: pages that were read count as memory of the process while their mapping lives.
            rows = np.memmap(self.path, block.dtype, "r", block.start, block.shape, order)[start : start + size]
            codes = np.array(rows).astype(np.int64)
            yield list(islice(names, len(codes))), [*codes.swapaxes(0, 1)] if levels > 1 else [codes]

    def _names(self) -> Iterator[str]:
        if not self.named:
            width = len(str(max(0, self.items - 1)))
            yield from (f"{i:0{width}d}" for i in range(self.items))
            return
        with items_path(self.path).open(encoding="utf-8") as file:
            yield from (line.rstrip("\n") for line in file)

    def _lists(self, levels: int, size: int) -> Iterator[Batch]:
        names, rows = list[str](), list[list[NDArray[np.int64]]]()
        for name, row in _table_rows(self.path) if self.path.suffix == ".parquet" else _json_rows(self.path):
            codes = _levels_of(row, levels, f"{self.path}: item {name}")
            if rows and (len(rows) == size or [c.shape for c in codes] != [c.shape for c in rows[0]]):
                yield names, [np.stack(level) for level in zip(*rows, strict=True)]
                names, rows = [], []
            names.append(name)
            rows.append(codes)
        if rows:
            yield names, [np.stack(level) for level in zip(*rows, strict=True)]


def open_tokens(path: Path) -> TokenFile:
    """Open a file of tokens; of an array only the header is read, of tables nothing.

    Raises:
        CodebookError: It is missing, damaged, of an unknown kind or empty, or the file beside it names another number
            of items.
    """
    if path.suffix not in FORMATS:
        raise CodebookError(f"{path} ends in none of {', '.join(FORMATS)}, in which tokens are read")
    try:
        check_regular(path)
        if path.is_dir():
            raise CodebookError(f"{path} is a directory; name a file of tokens")
        opened = _open_array(path) if path.suffix in BLOCKS else _open_table(path)
    except FileNotFoundError as error:
        raise CodebookError(f"no such file: {path}") from error
    except OSError as error:
        raise CodebookError(f"cannot read {path}: {one_line(error)}") from error
    if not opened.items:
        raise CodebookError(f"{path} holds no token")
    return opened


def _open_array(path: Path) -> TokenFile:
    blocks = [*BLOCKS[path.suffix](path, ())]
    shape = blocks[0].shape
    if not shape:
        raise CodebookError(f"{path} holds one number; tokens have an axis of items")
    metadata = read_safetensors(path).metadata if path.suffix == ".safetensors" else {}
    if not math.prod(shape):
        raise CodebookError(f"{path} holds no token: its shape is {shape}")
    names = items_path(path)
    if names.is_file():
        with names.open("rb") as file:
            lines = sum(1 for _ in file)
        if lines != shape[0]:
            raise CodebookError(f"{names} names {lines:,} items, and {path} holds {shape[0]:,}; delete the former")
    return TokenFile(path, shape[0], _ours(metadata), names.is_file())


def _open_table(path: Path) -> TokenFile:
    if path.suffix == ".parquet":
        with open_table(path) as table:
            metadata = {key.decode(): of.decode() for key, of in (table.schema_arrow.metadata or {}).items()
                        if key.startswith(PREFIX.encode())}  # fmt: skip
            return TokenFile(path, table.metadata.num_rows, _ours(metadata), ITEM in table.schema_arrow.names)
    with path.open("rb") as file:
        return TokenFile(path, sum(1 for line in file if line.strip()), {}, True)


def _ours(metadata: Mapping[str, str]) -> dict[str, str]:
    return {name.removeprefix(PREFIX): text for name, text in metadata.items() if name.startswith(PREFIX)}


def _table_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with open_table(path) as table:
        schema = table.schema_arrow
        (codes,) = choose(path, "column", (), {field.name: holds_integers(field.type) for field in schema})
        names = [ITEM] if ITEM in schema.names else []
        numbers = count()
        for batch in table.iter_batches(1024, columns=[*names, codes]):
            rows = batch.column(codes).to_pylist()
            items = batch.column(ITEM).to_pylist() if names else [str(i) for i in islice(numbers, len(rows))]
            yield from zip(map(str, items), rows, strict=True)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    for number, record in json_records(path):
        yield str(record.get(ITEM, number - 1)), record[CODES]


def _levels_of(row: Any, levels: int, where: str) -> list[NDArray[np.int64]]:
    """The arrays of one item's nested lists."""
    if levels > 1 and (not isinstance(row, list) or len(row) != levels):
        has = len(row) if isinstance(row, list) else "no"
        raise CodebookError(f"{where} has {has} levels, and the model {levels}")
    return [integers(part, where) for part in (row if levels > 1 else [row])]


def integers(nested: Any, where: str) -> NDArray[np.int64]:
    """Nested lists of integers as an array. where: names them in an error.

    Raises:
        CodebookError: They hold something else, or lists of unlike lengths.
    """
    try:
        values = np.array(nested)
    except ValueError:
        values = np.array(None)
    if values.dtype.kind not in "iu" or not values.size:
        raise CodebookError(f"{where} holds no grid of integers, which tokens are")
    return values.astype(np.int64)


def check_range(codes: Sequence[NDArray[np.int64]], sizes: Sequence[int], names: Sequence[str], path: Path) -> None:
    """Check that tokens are codes.

    Args:
        codes: (n, *grid) of each level.
        sizes: Codes of each level.
        names: Of the n items, for messages.
        path: Of the file, for messages.

    Raises:
        CodebookError: A token is none; the message names the first.
    """
    for level, (of, size) in enumerate(zip(codes, sizes, strict=True)):
        bad = (of < 0) | (of >= size)
        if bad.any():
            first = np.argwhere(bad)[0]
            at = f" at level {level}" if len(sizes) > 1 else ""
            raise CodebookError(
                f"{path}: token {of[tuple(first)]} of item {names[first[0]]}{at} is not within 0 and {size - 1}, the "
                "model's codes; is it the model that made them?"
            )
