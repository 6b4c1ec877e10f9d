"""Columns of parquet and Arrow files, read by row groups, of which the recent ones are kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codebook_tools.errors import CodebookError, one_line
from codebook_tools.runtime.optional import require

PARQUET = ".parquet"
"""Suffix of parquet files; other tables are Arrow files, or streams as Hugging Face data sets cache them."""

RECENT_BYTES = 256 << 20
"""Bytes of row groups that are kept: in order of name, rows alternate between a few groups (1, 10, 100, 1000, ...)."""

_LARGE, _VALUES_A_BYTE = 1 << 30, 200
"""A row group may be longer than _LARGE bytes, and the file times _VALUES_A_BYTE, only by repeating itself."""


@dataclass(frozen=True)
class Table:
    """What the header of a table says.

    Attributes:
        types: Name and Arrow type of each column.
        groups: Rows and bytes of each row group.
    """

    types: Sequence[tuple[str, Any]]
    groups: Sequence[tuple[int, int]]

    @property
    def length(self) -> int:
        """Number of rows."""
        return sum(rows for rows, _ in self.groups)


def read_table(file: Path) -> Table:
    """Read the header of a parquet or Arrow file.

    Raises:
        CodebookError: pyarrow is missing, or the file is damaged.
    """
    parquet = require(str(file), "parquet", "pyarrow.parquet")
    is_parquet = file.suffix.lower() == PARQUET
    try:
        if is_parquet:
            with parquet.ParquetFile(file) as opened:
                schema, metadata = opened.schema_arrow, opened.metadata
                groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
                table = Table(
                    [(field.name, field.type) for field in schema],
                    [(group.num_rows, group.total_byte_size) for group in groups],
                )
        else:
            stored = _arrow(file)
            table = Table(
                [(field.name, field.type) for field in stored.schema],
                [(batch.num_rows, batch.nbytes) for batch in stored.to_batches()],
            )
        nbytes = file.stat().st_size
    except Exception as error:  # pyarrow raises whatever it likes on a damaged file
        kind = "parquet" if is_parquet else "Arrow"
        raise CodebookError(f"{file} is not a readable {kind} file: {one_line(error)}") from error
    if table.length > nbytes or min((rows for rows, _ in table.groups), default=0) < 0:
        raise CodebookError(f"{file} is damaged: it claims {table.length:,} rows in {nbytes:,} bytes")
    return table


def _arrow(file: Path) -> Any:
    """The table of an Arrow file or stream, mapped into memory."""
    import pyarrow as pa

    mapped = pa.memory_map(str(file))
    try:
        return pa.ipc.open_file(mapped).read_all()
    except pa.ArrowInvalid:
        mapped.seek(0)
        return pa.ipc.open_stream(mapped).read_all()


@dataclass(frozen=True)
class Column:
    """A column of a table; the row groups read last are kept, those of all files together.

    Attributes:
        file: Path of the table.
        name: Of the column.
    """

    file: str
    name: str

    def cell(self, group: int, row: int) -> Any:
        """The Arrow scalar of a row of a row group. Raises ValueError with the reason where the group is damaged."""
        key = (self, group)
        if key not in _RECENT:
            _RECENT[key] = self.read(group)
            while len(_RECENT) > 1 and sum(block.nbytes for block in _RECENT.values()) > RECENT_BYTES:
                _RECENT.popitem(last=False)
        _RECENT.move_to_end(key)
        return _RECENT[key][row]

    def read(self, group: int) -> Any:
        """The column in a row group, a chunked array. Without threads: workers are forks, in which those are gone.

        Raises:
            ValueError: The group is damaged; the message says how.
        """
        import pyarrow as pa
        from pyarrow import parquet

        if Path(self.file).suffix.lower() != PARQUET:
            return pa.chunked_array([_arrow(Path(self.file)).to_batches()[group].column(self.name)])
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


_RECENT = OrderedDict[tuple[Column, int], Any]()
