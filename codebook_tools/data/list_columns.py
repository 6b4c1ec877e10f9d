"""Lists of numbers in a column of a parquet or Arrow file: an item a row, of any length."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from codebook_tools.data.columns import Column, Table, read_table
from codebook_tools.data.items import Item, RaggedItem
from codebook_tools.data.sources import Source, file_and_entry
from codebook_tools.errors import CodebookError, few_of


def list_items(path: Path) -> list[Item]:
    """List the rows of a column of lists.

    Args:
        path: FILE, or FILE:COLUMN where the file has several columns of lists of numbers.

    Returns:
        An item for each row, named FILE#row, FILE:COLUMN#row where the file has several such columns; lists of lists
        of one length are arrays of more axes.

    Raises:
        CodebookError: The file is damaged or empty, or it is not clear which column is meant.
    """
    file, column = file_and_entry(path)
    table = read_table(file)
    candidates = [name for name, of in table.types if holds_numbers(of)]
    chosen = _chosen(file, column, candidates, table)
    if not table.length:
        raise CodebookError(f"{file} has no rows, which items are")
    front = f"{file.name}:{chosen}" if len(candidates) > 1 else file.name
    stored, items = Column(str(file), chosen), list[Item]()
    for group, (n, size) in enumerate(table.groups):
        for row, shape in enumerate(_shapes(file, stored, group)):
            name, cell = f"{front}#{len(items)}", _ListCell(stored, group, row)
            source = Source(name, max(1, size // n), cell.open, str(file), exact=False)
            items.append(RaggedItem(name, source, cell, None, shape))
    return items


def _shapes(file: Path, column: Column, group: int) -> list[tuple[int, ...]]:
    """The shape of each row of a row group, by the first list within each list."""
    try:
        cells = column.read(group).combine_chunks()
    except ValueError as error:
        raise CodebookError(f"{file} is damaged: {error}") from error
    from pyarrow import compute

    axes, first = list[NDArray[np.int64]](), np.arange(len(cells))
    while _is_list(cells.type):
        lengths = compute.list_value_length(cells).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        known = first < len(lengths)
        axes.append(np.where(known, np.append(lengths, 0)[np.minimum(first, len(lengths))], 0))
        first, cells = starts[np.minimum(first, len(lengths))], cells.flatten()
    return [tuple(map(int, shape)) for shape in zip(*axes, strict=True)]


def _is_list(of: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(of) or types.is_large_list(of) or types.is_fixed_size_list(of))


def holds_numbers(of: Any) -> bool:
    """Whether an Arrow type is a list of numbers, or of such lists."""
    from pyarrow import types

    if not _is_list(of):
        return False
    inner = of.value_type
    return holds_numbers(inner) or bool(types.is_integer(inner) or types.is_floating(inner))


def _chosen(file: Path, column: str | None, candidates: list[str], table: Table) -> str:
    of = {name: str(type_).partition("<")[0] for name, type_ in table.types}
    if column is not None and column not in candidates:
        said = f"column {column} holds {of[column]}" if column in of else f"no column {column}"
        raise CodebookError(
            f"{file}: {said}; expected lists of numbers: {', '.join(candidates) or 'no column has them'}"
        )
    if not candidates:
        known = few_of([f"{name} ({kind})" for name, kind in of.items()])
        raise CodebookError(f"{file} has no column of lists of numbers; its columns: {known or 'none'}")
    if column is None and len(candidates) > 1:
        raise CodebookError(
            f"{file} has {len(candidates)} columns of lists: {', '.join(candidates)}; say which: {file}:{candidates[0]}"
        )
    return column or candidates[0]


@dataclass(frozen=True, eq=False, slots=True)
class _ListCell:
    """A row: calling it gives the numbers, `open` their bytes."""

    column: Column
    group: int
    row: int

    def __call__(self) -> NDArray[Any]:
        """The numbers, floats as float32. Raises ValueError where one is missing, or lists within differ in length."""
        cell = self.column.cell(self.group, self.row)
        if not cell.is_valid:
            raise ValueError("its row is empty")
        array = cell.values
        shape = [len(array)]
        while _is_list(array.type):
            lengths = {None if value is None else len(value) for value in array}
            if len(lengths) > 1 or None in lengths:
                raise ValueError("lists within it have unlike lengths")
            shape.append(max(length for length in lengths or {0} if length is not None))
            array = array.flatten()
        if array.null_count:
            raise ValueError("a value is missing")
        values: NDArray[Any] = array.to_numpy(zero_copy_only=False).reshape(shape)
        return values.astype(np.float32) if values.dtype.kind == "f" else values.astype(np.int64)

    def open(self) -> BinaryIO:
        """The numbers as bytes."""
        return io.BytesIO(self().tobytes())
