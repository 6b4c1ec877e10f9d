"""Pictures in a column of parquet files, as Hugging Face data sets store them: an item a row, read by row groups."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from codebook_tools.data.columns import Column, read_table
from codebook_tools.data.image_decoding import decode_picture
from codebook_tools.data.items import Item, Values
from codebook_tools.data.sources import Source, file_and_entry
from codebook_tools.errors import CodebookError

_EXPECTED = "encoded images (bytes, or a struct with a field bytes)"


def parquet_images(path: Path) -> list[Item]:
    """List the pictures of a parquet file without reading them.

    Args:
        path: FILE, or FILE:COLUMN where the file has several columns of images.

    Returns:
        An item for each row, named FILE#row; FILE:COLUMN#row where the file has several columns of images.

    Raises:
        CodebookError: pyarrow is missing, the file is damaged or empty, or it is not clear which column holds images.
    """
    file, column = file_and_entry(path)
    table = read_table(file)
    candidates = [name for name, type_ in table.types if holds_bytes(type_)]
    chosen = _chosen(file, column, candidates, table.types)
    if not table.length:
        raise CodebookError(f"{file} has no rows, which images are")
    front = f"{file.name}:{chosen}" if len(candidates) > 1 else file.name
    stored, items = Column(str(file), chosen), list[Item]()
    for group, (n, size) in enumerate(table.groups):
        for row in range(n):
            name, cell = f"{front}#{len(items)}", _Cell(stored, group, row)
            items.append(Item(name, Source(name, max(1, size // n), cell.open, str(file), exact=False), cell))
    return items


def has_pictures(file: Path) -> bool:
    """Whether a parquet file has a column that may hold pictures. Raises CodebookError where it cannot be read."""
    return any(holds_bytes(of) for _, of in read_table(file).types)


def holds_bytes(stored: Any) -> bool:
    """Whether an arrow type is binary, or a struct with a binary field `bytes`."""
    from pyarrow import types

    if types.is_struct(stored):
        index = stored.get_field_index("bytes")
        return index >= 0 and holds_bytes(stored.field(index).type)
    return bool(types.is_binary(stored) or types.is_large_binary(stored))


def _chosen(file: Path, column: str | None, candidates: Sequence[str], types: Sequence[tuple[str, Any]]) -> str:
    """The column of images. types: name and arrow type of all columns. Raises CodebookError where it is not clear."""
    all_ = ", ".join(f"{name} ({str(type_).partition('<')[0]})" for name, type_ in types) or "none"
    if column is not None and column not in candidates:
        of = next((f"column {column} holds {type_}" for name, type_ in types if name == column), f"no column {column}")
        raise CodebookError(f"{file}: {of}; expected one of {_EXPECTED}: {', '.join(candidates) or all_}")
    if not candidates:
        raise CodebookError(f"{file} has no column of {_EXPECTED}; its columns: {all_}")
    if column is None and len(candidates) > 1:
        raise CodebookError(
            f"{file} has {len(candidates)} columns that may hold images: {', '.join(candidates)}; "
            f"say which: {file}:{candidates[0]}"
        )
    name = column or candidates[0]
    if [other for other, _ in types].count(name) > 1:
        raise CodebookError(f"{file} has several columns called {name}; rename those that hold no images")
    return name


@dataclass(frozen=True, eq=False, slots=True)
class _Cell:
    """A row: calling it decodes the picture, `open` gives its bytes."""

    column: Column
    group: int
    row: int

    def __call__(self) -> Values:
        return decode_picture(self._stored())

    def open(self) -> BinaryIO:
        """The encoded picture as a stream."""
        return io.BytesIO(self._stored())

    def _stored(self) -> bytes:
        """The encoded picture. Raises ValueError with the reason where there is none."""
        value = self.column.cell(self.group, self.row).as_py()
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            path = value.get("path") if isinstance(value, dict) else None
            raise ValueError(f"its row holds no bytes, only the path {path}" if path else "its row is empty")
        assert isinstance(data, bytes)
        return data
