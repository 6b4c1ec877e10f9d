"""Pictures in a column of parquet files, as Hugging Face data sets store them: an item a row, read by row groups."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from codebook_tools.data.image_decoding import decode_picture
from codebook_tools.data.items import Item, Values
from codebook_tools.data.sources import Source, file_and_entry
from codebook_tools.errors import CodebookError, one_line
from codebook_tools.runtime.optional import require

RECENT_BYTES = 256 << 20
"""Bytes of row groups that are kept: in order of name, rows alternate between a few groups (1, 10, 100, 1000, ...)."""

_LARGE, _VALUES_A_BYTE = 1 << 30, 200
"""A row group may be longer than _LARGE bytes, and the file times _VALUES_A_BYTE, only by repeating itself."""

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
    parquet = require(str(file), "parquet", "pyarrow.parquet")
    try:
        with parquet.ParquetFile(file) as table:
            schema, metadata = table.schema_arrow, table.metadata
            types = [(field.name, field.type) for field in schema]
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            rows = [(group.num_rows, group.total_byte_size) for group in groups]
    except Exception as error:  # pyarrow raises whatever it likes on a damaged file
        raise CodebookError(f"{file} is not a readable parquet file: {one_line(error)}") from error
    candidates = [name for name, type_ in types if _holds_pictures(type_)]
    chosen = _chosen(file, column, candidates, types)
    count, nbytes = sum(n for n, _ in rows), file.stat().st_size
    if not count:
        raise CodebookError(f"{file} has no rows, which images are")
    if count > nbytes or min(n for n, _ in rows) < 0:
        raise CodebookError(f"{file} is damaged: it claims {count:,} rows in {nbytes:,} bytes")
    front = f"{file.name}:{chosen}" if len(candidates) > 1 else file.name
    stored, items = _Column(str(file), chosen), list[Item]()
    for group, (n, size) in enumerate(rows):
        for row in range(n):
            name, cell = f"{front}#{len(items)}", _Cell(stored, group, row)
            items.append(Item(name, Source(name, max(1, size // n), cell.open, str(file), exact=False), cell))
    return items


def _holds_pictures(stored: Any) -> bool:
    """Whether an arrow type is binary, or a struct with a binary field `bytes`."""
    from pyarrow import types

    if types.is_struct(stored):
        index = stored.get_field_index("bytes")
        return index >= 0 and _holds_pictures(stored.field(index).type)
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


@dataclass(frozen=True, eq=False)
class _Column:
    """A column of a parquet file; the row groups read last are kept, those of all files together."""

    file: str
    name: str

    def stored(self, group: int, row: int) -> bytes:
        """The encoded picture of a row. Raises ValueError with the reason where there is none."""
        key = (self, group)
        if key not in _RECENT:
            _RECENT[key] = self._read(group)
            while len(_RECENT) > 1 and sum(block.nbytes for block in _RECENT.values()) > RECENT_BYTES:
                _RECENT.popitem(last=False)
        _RECENT.move_to_end(key)
        value = _RECENT[key][row].as_py()
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            path = value.get("path") if isinstance(value, dict) else None
            raise ValueError(f"its row holds no bytes, only the path {path}" if path else "its row is empty")
        assert isinstance(data, bytes)
        return data

    def _read(self, group: int) -> Any:
        """The column in a row group, a chunked array. Without threads: workers are forks, in which those are gone."""
        import pyarrow as pa
        from pyarrow import parquet

        most = max(_LARGE, _VALUES_A_BYTE * Path(self.file).stat().st_size)
        chunks, nbytes = list[Any](), 0
        try:
            with parquet.ParquetFile(self.file) as table:
                for batch in table.iter_batches(64, [group], [self.name], use_threads=False):
                    chunks.append(batch.column(batch.schema.names.index(self.name)))
                    nbytes += chunks[-1].nbytes
                    if nbytes > most:
                        raise ValueError(f"row group {group} repeats itself to more than {most:,} bytes")
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # of the file, not of what is in it
                raise
            raise ValueError(f"row group {group} is damaged: {one_line(error)}") from error
        return pa.chunked_array(chunks)


_RECENT = OrderedDict[tuple[_Column, int], Any]()


@dataclass(frozen=True, eq=False, slots=True)
class _Cell:
    """A row: calling it decodes the picture, `open` gives its bytes."""

    column: _Column
    group: int
    row: int

    def __call__(self) -> Values:
        return decode_picture(self.column.stored(self.group, self.row))

    def open(self) -> BinaryIO:
        """The encoded picture as a stream."""
        return io.BytesIO(self.column.stored(self.group, self.row))
