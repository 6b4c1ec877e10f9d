"""Data sets on the Hugging Face hub, streamed by its library `datasets`: an item a row, in the order of the rows."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import Any, BinaryIO

import numpy as np

from codebook_tools.data.items import Item, RaggedItem, Values
from codebook_tools.data.list_columns import holds_numbers
from codebook_tools.data.modality import AUDIO, BINARY, IMAGE, NUMBERS, Modality
from codebook_tools.data.parquet_images import holds_bytes
from codebook_tools.data.sources import Source
from codebook_tools.errors import CodebookError, few_of, one_line
from codebook_tools.runtime.hub import in_one_line, library
from codebook_tools.runtime.hub_ids import DataSetId, data_set_id
from codebook_tools.runtime.optional import require
from codebook_tools.runtime.progress import Watch


@dataclass(frozen=True)
class Opened:
    """A split of a data set, of which no row has been read.

    Attributes:
        asked: With the commit as its revision, and the split.
        rows: The split, an IterableDataset that decodes nothing.
        root: What the path of a file of the data set begins with.
        kinds: Kind of each column that may hold items.
        columns: Type of each column, for messages.
        total: Number of rows, where the data set says it.
    """

    asked: DataSetId
    rows: Any
    root: str
    kinds: dict[str, str]
    columns: dict[str, str]
    total: int | None


def opened(asked: DataSetId) -> Opened:
    """Open a split; the same one is opened once.

    Raises:
        CodebookError: The library is missing, there is no such data set or split, or the hub cannot be asked.
    """
    if asked not in _OPENED:
        datasets = require(str(asked), "hub", "datasets")
        with in_one_line(str(asked), asked.repository, asked.revision):
            _OPENED[asked] = _open(datasets, library(str(asked)), asked)
    return _OPENED[asked]


_OPENED: dict[DataSetId, Opened] = {}


def _open(datasets: Any, hub: Any, asked: DataSetId) -> Opened:
    name, revision = asked.repository, asked.revision
    place: dict[str, Any]
    if hub.constants.HF_HUB_OFFLINE:
        folder = Path(hub.snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True))
        place, commit = {"path": str(folder)}, folder.name
    else:
        commit = hub.HfApi().dataset_info(name, revision=revision, timeout=hub.constants.HF_HUB_ETAG_TIMEOUT).sha
        place = {"path": name, "revision": commit}
    try:
        splits = datasets.load_dataset(**place, streaming=True)
    except (ValueError, FileNotFoundError) as error:  # several configurations, no data files, a loading script
        if type(error).__module__.startswith("huggingface_hub"):
            raise
        raise CodebookError(f"{asked}: the library datasets cannot read it: {one_line(error)[:200]}") from error
    split = asked.split or ("train" if "train" in splits else next(iter(splits)))
    if split not in splits:
        raise CodebookError(f"{asked} has no split {split}; it has {', '.join(map(str, splits))}")
    rows = splits[split].decode(False)
    if rows.features is None:
        rows = rows._resolve_features()
    stored = rows.features.arrow_schema
    kinds = {column: _kind(feature, stored.field(column).type) for column, feature in rows.features.items()}
    sizes = getattr(rows.info, "splits", None) or {}
    return Opened(
        asked=replace(asked, revision=commit, split=split),
        rows=rows,
        root=f"{place['path']}/" if "revision" not in place else f"hf://datasets/{name}@{commit}/",
        kinds={column: kind for column, kind in kinds.items() if kind},
        columns={field.name: str(field.type).partition("<")[0] for field in stored},
        total=sizes[split].num_examples if split in sizes else None,
    )


def _kind(feature: Any, stored: Any) -> str | None:
    stored = getattr(stored, "storage_type", stored)  # of an array of fixed axes
    if type(feature).__name__ in (IMAGE, AUDIO):
        return type(feature).__name__
    if holds_bytes(stored):
        return BINARY
    return NUMBERS if holds_numbers(stored) else None


def is_of_numbers(asked: DataSetId) -> bool:
    """Whether the column that is asked for, or any where none is, holds arrays, and none holds pictures or sound."""
    kinds = opened(asked).kinds
    if asked.column is not None:
        return kinds.get(asked.column) == NUMBERS
    return NUMBERS in kinds.values() and not {IMAGE, AUDIO} & {*kinds.values()}


def stated(text: str) -> str:
    """A data set as results name it: with its commit, if it was opened here; any other text as it is."""
    asked = data_set_id(text)
    return str(_OPENED[asked].asked) if asked in _OPENED else text


def hub_items(asked: DataSetId, modality: Modality, watch: Watch, first: int | None) -> Sequence[Item]:
    """The items of a column, read once into a temporary file without a name.

    Args:
        asked: The column.
        modality: The kind of data.
        watch: Is told the rows that were read.
        first: So many rows are read at most; None for all.

    Returns:
        Items named REPOSITORY:SPLIT#row.

    Raises:
        CodebookError: No column or several hold such data, or the hub or the disk fails.
    """
    source = opened(asked)
    column = _column(source, asked, modality)
    key = (source.asked, column, first)
    if key not in _READ:
        with in_one_line(str(asked), asked.repository, asked.revision):
            _READ[key] = _read(source, column, watch, first)
    rows, name = _READ[key], f"{source.asked.repository}:{source.asked.split}"
    if not rows:
        raise CodebookError(f"{asked} has no rows, which {modality.many} are")
    if source.kinds[column] != NUMBERS:
        return [item for i, row in enumerate(rows) for item in modality.items(row.source(f"{name}#{i}"))]
    if len({(row.shape, row.dtype) for row in rows}) == 1 and rows[0].shape:
        return modality.rows(name, _mapped(rows))
    return [_ragged(row, f"{name}#{i}") for i, row in enumerate(rows)]


def _column(source: Opened, asked: DataSetId, modality: Modality) -> str:
    fitting = [name for name, kind in source.kinds.items() if kind in modality.columns]
    named = [name for name in fitting if source.kinds[name] != BINARY] or fitting
    all_ = few_of([f"{name} ({kind})" for name, kind in source.columns.items()])
    if asked.column is not None and asked.column not in fitting:
        said = f"column {asked.column} holds no {modality.many}" if asked.column in source.columns else "no such column"
        raise CodebookError(f"{asked}: {said}; its columns: {all_}")
    if not fitting:
        raise CodebookError(f"{asked} has no column of {modality.many}; its columns: {all_}")
    if asked.column is None and len(named) > 1:
        first = replace(asked, column=named[0])
        raise CodebookError(f"{asked} has {len(named)} columns of {modality.many}; say which: {first}")
    return asked.column or named[0]


@dataclass(frozen=True, eq=False, slots=True)
class _Row:
    """Bytes of a row in the temporary file.

    Attributes:
        file: The file, which is gone when nothing refers to it.
        start: Of the bytes.
        nbytes: Their number.
        shape: Of an array; empty for other data.
        dtype: Of an array.
        problem: Why there are none; empty where there are.
    """

    file: Any
    start: int
    nbytes: int
    shape: tuple[int, ...] = ()
    dtype: str = ""
    problem: str = ""

    def read(self) -> bytes:
        """The bytes. Raises ValueError with the reason where there are none."""
        if self.problem:
            raise ValueError(self.problem)
        parts, start, left = list[bytes](), self.start, self.nbytes
        while left and (part := os.pread(self.file.fileno(), left, start)):
            parts.append(part)
            start, left = start + len(part), left - len(part)
        return b"".join(parts)

    def open(self) -> BinaryIO:
        """The bytes as a stream."""
        return io.BytesIO(self.read())

    def values(self) -> Values:
        """The array."""
        return np.frombuffer(self.read(), dtype=self.dtype).reshape(self.shape).copy()

    def source(self, name: str) -> Source:
        return Source(name, self.nbytes, self.open)


_READ: dict[tuple[DataSetId, str, int | None], list[_Row]] = {}


def _read(source: Opened, column: str, watch: Watch, first: int | None) -> list[_Row]:
    """Stream the rows of a column into a temporary file."""
    content = _array if source.kinds[column] == NUMBERS else partial(_encoded, source.root)
    total = first if source.total is None or (first is not None and first < source.total) else source.total
    file = TemporaryFile(buffering=0)  # noqa: SIM115 (its rows are read from it later)
    rows, end = list[_Row](), 0
    cells: Iterator[dict[str, Any]] = iter(source.rows.select_columns([column]))
    for cell in cells:
        if first is not None and len(rows) >= first:
            break
        try:
            data, shape, dtype = content(cell[column])
        except ValueError as error:
            rows.append(_Row(file, end, 0, problem=str(error)))
            continue
        try:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
        except OSError as error:
            raise CodebookError(
                f"cannot keep {source.asked} in {gettempdir()}: {one_line(error)}; set TMPDIR"
            ) from error
        rows.append(_Row(file, end, len(data), shape, dtype))
        end += len(data)
        watch.progress(f"stream {source.asked.repository}", len(rows), total)
    return rows


def _encoded(root: str, cell: Any) -> tuple[bytes, tuple[int, ...], str]:
    """An encoded picture or sound, or the file of the data set that a path names. Raises ValueError without one."""
    data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if data is None and path is None:
        raise ValueError("its row is empty")
    if data is None:
        place = str(path).rpartition("::")[2]
        if not place.startswith(root) or ".." in place:  # a row may name any file of this machine
            raise ValueError(f"its row holds no bytes, only the path {path}")
        with require(root, "hub", "fsspec").open(path, "rb") as stream:
            data = stream.read()
    assert isinstance(data, bytes)
    return data, (), ""


def _array(cell: Any) -> tuple[bytes, tuple[int, ...], str]:
    """An array, floats as float32. Raises ValueError where a value is missing, or lists within differ in length."""
    if cell is None:
        raise ValueError("its row is empty")
    try:
        values = np.asarray(cell)
    except ValueError:
        raise ValueError("lists within it have unlike lengths") from None
    if values.dtype.kind not in "fiu":
        raise ValueError("a value is missing")
    values = np.ascontiguousarray(values, np.float32 if values.dtype.kind == "f" else np.int64)
    return values.tobytes(), values.shape, values.dtype.str


def _mapped(rows: Sequence[_Row]) -> Values:
    """Rows of one shape as one array that is read from the file when it is needed: (n, ...)."""
    first = rows[0]
    return np.memmap(first.file, first.dtype, "c", first.start, (len(rows), *first.shape))


def _ragged(row: _Row, name: str) -> RaggedItem:
    decode: Callable[[], Values] = row.values
    return RaggedItem(name, row.source(name), decode, None, row.shape)
