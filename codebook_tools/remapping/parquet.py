"""Parquet tables of tokens: columns of integers, or of nested lists of them, rewritten in batches of rows."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codebook_tools.errors import CodebookError
from codebook_tools.remapping.token_choice import choose
from codebook_tools.remapping.token_ids import Ids, Translation
from codebook_tools.runtime.optional import require

_ROWS = 1024  # a batch: a row may be all tokens of an image

# Values that a column of a row group may have in a file of any length, and beyond that for each byte of the file: an
# eighth of a bit for a value is fewer than tokens of a collapsed codebook take.
_MOST_VALUES = 1 << 24
_VALUES_PER_BYTE = 64


def rewrite_parquet(path: Path, translation: Translation, keys: Sequence[str], axis: int | None) -> Iterator[bytes]:
    """Translate the ids of a table; schema, compression and size of row groups stay.

    Args:
        path: The parquet file.
        translation: From old ids to new ones; it counts them.
        keys: Columns of tokens; none for the only column of integers.
        axis: Which axis runs over the codebooks: 0 is the row, 1 the position in its list, and so on. None for one
            codebook.

    Yields:
        The bytes of the new file, in order.

    Raises:
        CodebookError: pyarrow is missing, the file is damaged, or it is not clear which columns hold tokens.
    """
    pa, parquet = require(str(path), "parquet", "pyarrow"), require(str(path), "parquet", "pyarrow.parquet")
    with open_table(path) as table:
        schema, metadata = table.schema_arrow, table.metadata
        chosen = choose(path, "column", keys, {field.name: holds_integers(field.type) for field in schema})
        for name in sorted(chosen):
            if schema.names.count(name) > 1:
                raise CodebookError(f"{path} has several columns called {name}; rename those that hold no tokens")
        sink = Sink()
        with parquet.ParquetWriter(pa.PythonFile(sink, "w"), schema, compression=_compression(metadata)) as writer:
            group = max((metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)), default=1)
            row = 0
            for batch in table.iter_batches(_ROWS):
                for i, name in enumerate(schema.names):
                    if name in chosen:
                        rewritten = _Column(f"{name} in {path}", translation, axis).rewrite(
                            batch.column(i), (np.arange(row, row + len(batch)),)
                        )
                        batch = batch.set_column(i, schema.field(i), rewritten)
                writer.write_batch(batch, row_group_size=max(group, 1))
                row += len(batch)
                yield sink.drained()
        yield sink.drained()


def nested_length(path: Path, keys: Sequence[str]) -> int | None:
    """Entries of the outermost list of tokens in the first row; None where there is no list. keys: as rewrite_parquet.

    Raises:
        CodebookError: As `rewrite_parquet`.
    """
    with open_table(path) as table:
        chosen = choose(path, "column", keys, {field.name: holds_integers(field.type) for field in table.schema_arrow})
        for batch in table.iter_batches(1, columns=sorted(chosen)):
            first = batch.column(0)[0].as_py()
            return len(first) if isinstance(first, list) else None
    return None


@contextmanager
def open_table(path: Path) -> Iterator[Any]:
    """Open a pyarrow.parquet.ParquetFile that is sound.

    Raises:
        CodebookError: pyarrow is missing, or the file is damaged, also where that comes up within the context.
    """
    pa, parquet = require(str(path), "parquet", "pyarrow"), require(str(path), "parquet", "pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as table:
            # Damaged column metadata raises here; the accessors that _check_repeats reads would abort the process.
            table.scan_contents(batch_size=_ROWS)
            _check_repeats(path, table.metadata)
            yield table
    except (pa.ArrowException, UnicodeDecodeError) as error:  # the latter of names of columns
        raise CodebookError(f"{path} is not a sound parquet file: {' '.join(str(error).split())}") from error


def _check_repeats(path: Path, metadata: Any) -> None:
    """Raise CodebookError where a small file expands to more values than memory may hold: run-length encoding stores
    any number of repetitions in a few bytes, and rows are read whole."""
    most = max(_MOST_VALUES, _VALUES_PER_BYTE * path.stat().st_size)
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.num_values > max(most, group.num_rows):
                raise CodebookError(
                    f"{path}: {column.path_in_schema} repeats itself to {column.num_values:,} values in "
                    f"{path.stat().st_size:,} bytes; write it in smaller row groups"
                )


def holds_integers(column_type: Any) -> bool:
    """Whether a column of this type holds integers, or lists of them, however deep."""
    from pyarrow import types

    while types.is_list(column_type) or types.is_large_list(column_type) or types.is_fixed_size_list(column_type):
        column_type = column_type.value_type
    return bool(types.is_integer(column_type))


def _compression(metadata: Any) -> dict[str, str] | str:
    """Of each column, as in the first row group."""
    if not metadata.num_row_groups:
        return "snappy"
    group = metadata.row_group(0)
    columns = (group.column(i) for i in range(group.num_columns))
    return {c.path_in_schema: c.compression.replace("UNCOMPRESSED", "NONE") for c in columns}


@dataclass(frozen=True)
class _Column:
    name: str
    translation: Translation
    axis: int | None

    def rewrite(self, array: Any, places: tuple[NDArray[np.int64], ...]) -> Any:
        """Translate an arrow array; nulls stay. places: for each level of nesting, the position of each entry."""
        import pyarrow as pa
        from pyarrow import compute, types

        if types.is_fixed_size_list(array.type):
            return self.rewrite(array.cast(pa.list_(array.type.value_field)), places).cast(array.type)
        if types.is_integer(array.type):
            valid = array.is_valid().to_numpy(zero_copy_only=False)
            new = np.zeros(len(array), str(array.type))
            new[valid] = self._translated(array.drop_null().to_numpy(), tuple(place[valid] for place in places))
            return pa.array(new, array.type, mask=~valid)
        lengths = compute.list_value_length(array).fill_null(0).to_numpy().astype(np.int64)
        ends = np.cumsum(lengths)
        within = np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)
        values = self.rewrite(array.flatten(), (*(np.repeat(place, lengths) for place in places), within))
        offsets = pa.array(np.concatenate([[0], ends]), pa.int32() if types.is_list(array.type) else pa.int64())
        return type(array).from_arrays(offsets, values, type=array.type, mask=array.is_null())

    def _translated(self, ids: Ids, places: tuple[NDArray[np.int64], ...]) -> Ids:
        stages: NDArray[np.int64] | int = 0
        if self.axis is not None:
            codebooks = len(self.translation.maps)
            if not 0 <= self.axis < len(places):
                raise CodebookError(f"{self.name} is nested {len(places)} deep and has no axis {self.axis}")
            stages = places[self.axis]
            if len(ids) and stages.max() >= codebooks:
                raise CodebookError(f"{self.name} has more codebooks along axis {self.axis} than the map's {codebooks}")
        return self.translation(ids, stages, lambda i: f"{self.name} at [{', '.join(str(p[i]) for p in places)}]")


class Sink(io.RawIOBase):
    """Collects the bytes that a ParquetWriter writes, until `drained` takes them."""

    def __init__(self) -> None:
        super().__init__()
        self._chunks, self._length = list[bytes](), 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._length

    def write(self, data: Any) -> int:
        chunk = bytes(data)
        self._chunks.append(chunk)
        self._length += len(chunk)
        return len(chunk)

    def drained(self) -> bytes:
        content = b"".join(self._chunks)
        self._chunks.clear()
        return content
