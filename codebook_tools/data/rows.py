"""Rows of arrays as items: selected by bits, read by blocks, and made into items only when one is asked for."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codebook_tools.data.items import Item, name_sha256
from codebook_tools.data.sampling import mixed, sample_keys
from codebook_tools.data.sources import Source
from codebook_tools.errors import plain

BLOCK = 65_536
"""Rows per block; a multiple of 8, as the selected rows are stored as bits."""

Numbers = NDArray[np.int64]
"""(n,) ascending indices of rows of a file."""


@dataclass(frozen=True, eq=False)
class Groups:
    """The group of each row of a file.

    Attributes:
        of: (length,) int64, indices of `keys`.
        keys: The groups' keys.
    """

    of: NDArray[np.int64]
    keys: tuple[str, ...]

    @cached_property
    def words(self) -> NDArray[np.uint64]:
        """(groups, 4): the words of the SHA-256 of each key, by which `Item.drawn` splits."""
        digests = b"".join(name_sha256(key) for key in self.keys)
        return np.frombuffer(digests, dtype=">u8").reshape(-1, 4).astype(np.uint64)


@dataclass(frozen=True, eq=False)
class RowFile:
    """Selected rows of an array, in a file or in memory.

    Attributes:
        name: Unique name of the array; a row is named NAME#row.
        length: Number of all rows.
        mapped: Maps all rows, (length, ...), into memory: anew at each call, as pages that were read count as memory of
            the process while their mapping lives.
        chosen: uint8; one bit per row, in the order of np.packbits, set where the row is selected.
        kin: The name by which rows are split, where `name` has a prefix.
        groups: The group of each row; None where each is one of its own.
        path: The file; None for an array in memory.
    """

    name: str
    length: int
    mapped: Callable[[], Tensor]
    chosen: NDArray[np.uint8]
    kin: str | None = None
    groups: Groups | None = None
    path: str | None = None

    @classmethod
    def whole(cls, name: str, mapped: Callable[[], Tensor], path: str | None = None) -> Self:
        """All rows of an array."""
        length = len(mapped())
        return cls(name, length, mapped, np.packbits(np.ones(length, dtype=bool)), path=path)

    @cached_property
    def count(self) -> int:
        """Number of selected rows."""
        return sum(map(len, self.blocks()))

    def blocks(self) -> Iterator[Numbers]:
        """Indices of the selected rows in each block of BLOCK rows, ascending; blocks may be empty."""
        for start in range(0, self.length, BLOCK):
            yield self.block(start // BLOCK)

    def block(self, index: int) -> Numbers:
        """Indices of the selected rows of one block."""
        start = index * BLOCK
        return start + np.flatnonzero(np.unpackbits(self.chosen[start // 8 : (start + BLOCK) // 8]))

    def where(self, predicate: Callable[[Numbers], NDArray[np.bool_]]) -> Self:
        """The selected rows whose indices, (n,), a predicate maps to True, (n,)."""
        bits = np.zeros_like(self.chosen)
        for start, numbers in zip(range(0, self.length, BLOCK), self.blocks(), strict=True):
            mask = np.zeros(min(BLOCK, self.length - start), dtype=bool)
            mask[numbers - start] = predicate(numbers)
            bits[start // 8 : (start + BLOCK) // 8] = np.packbits(mask)
        return replace(self, chosen=bits)

    def without(self, other: RowFile) -> Self:
        """The selected rows that are not selected in `other`."""
        return replace(self, chosen=self.chosen & ~other.chosen)

    def stored(self, numbers: Numbers) -> Tensor:
        """Read rows.

        Args:
            numbers: (n,) ascending indices of one block, at least one.

        Returns:
            (n, ...) in the stored dtype.
        """
        first, last = int(numbers[0]), int(numbers[-1])
        rows = self.mapped()[first : last + 1]
        return rows if len(rows) == len(numbers) else rows[torch.from_numpy(numbers - first)]

    def hashes(self, numbers: Numbers) -> NDArray[np.uint64]:
        """(n,) hashes of the array's name and the indices, by which rows are sampled."""
        name = int.from_bytes(name_sha256(self.name)[24:], "big")
        return mixed(np.uint64(name) + numbers.astype(np.uint64))

    def words(self, numbers: Numbers, part: int) -> NDArray[np.uint64]:
        """(n,): word `part` of the SHA-256 of each row's name, or of its group's; see `Item.drawn`."""
        if self.groups is not None:
            words: NDArray[np.uint64] = self.groups.words[self.groups.of[numbers], part]
            return words
        name = self.kin or self.name
        digests = b"".join([name_sha256(f"{name}#{number}") for number in numbers.tolist()])
        return np.frombuffer(digests, dtype=">u8")[part::4].astype(np.uint64)

    def is_test(self, numbers: Numbers) -> NDArray[np.bool_]:
        """(n,): whether a row is in the tenth of test rows."""
        return self.in_tenth(0, numbers)

    def in_tenth(self, part: int, numbers: Numbers) -> NDArray[np.bool_]:
        """(n,): as `Item.in_tenth`."""
        tenth: NDArray[np.bool_] = self.words(numbers, part) % np.uint64(10) == 0
        return tenth

    @cached_property
    def row_nbytes(self) -> int:
        """Bytes of a stored row."""
        return self.mapped()[:1].nbytes

    def item(self, number: int) -> RowItem:
        """One row as an item."""
        name, row = f"{self.name}#{number}", partial(_values_of, self, number)
        key = f"{self.kin or self.name}#{number}" if self.groups is None else self.groups.keys[self.groups.of[number]]
        source = Source(name, self.row_nbytes, partial(_open_row, self, number), self.path)
        return RowItem(name, source, row, None if key == name else key, file=self, number=number)


def _values_of(file: RowFile, number: int) -> NDArray[Any]:
    stored = file.stored(np.array([number]))[0]
    return (stored.float() if stored.is_floating_point() else stored).numpy()


def _open_row(file: RowFile, number: int) -> io.BytesIO:
    return io.BytesIO(file.stored(np.array([number]))[0].contiguous().view(torch.uint8).numpy().tobytes())


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class RowItem(Item):
    """A row of an array.

    Attributes:
        file: The array.
        number: Index of the row.
    """

    file: RowFile = field(repr=False)
    number: int

    @property
    def digest(self) -> bytes:
        """32 bytes of which the last eight are the row's hash."""
        return bytes(24) + int(self.file.hashes(np.array([self.number]))[0]).to_bytes(8, "big")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowItem) and (self.name, self.number) == (other.name, other.number)

    def __hash__(self) -> int:
        return hash(self.name)


_File = TypeVar("_File", bound=RowFile)

if TYPE_CHECKING:
    _Items = Sequence[Item]
else:
    _Items = Sequence


@dataclass(frozen=True, eq=False)
class RowBatch(_Items):
    """A few rows of one array.

    Attributes:
        file: The array.
        numbers: Indices of the rows.
    """

    file: RowFile
    numbers: Numbers

    @property
    def hashes(self) -> NDArray[np.uint64]:
        """(n,) hashes, by which latents are sampled."""
        return self.file.hashes(self.numbers)

    @property
    def names(self) -> list[str]:
        """The names of the rows, on one line each, as `str` of an item."""
        front = plain(self.file.name)
        return [f"{front}#{number}" for number in self.numbers.tolist()]

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, at: int) -> Item: ...
    @overload
    def __getitem__(self, at: slice) -> RowBatch: ...
    def __getitem__(self, at: int | slice) -> Item | RowBatch:
        if isinstance(at, slice):
            return replace(self, numbers=self.numbers[at])
        return self.file.item(int(self.numbers[at]))


@dataclass(frozen=True, eq=False)
class Rows(_Items):
    """Selected rows of several arrays, in order of the arrays and of the rows.

    Attributes:
        files: The arrays, in order of name.
    """

    files: tuple[RowFile, ...]

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """The position of the first selected row of each block of each array, and the number of all."""
        lengths = [len(block) for file in self.files for block in file.blocks()]
        return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    @cached_property
    def _blocks(self) -> list[tuple[RowFile, int]]:
        return [(file, i) for file in self.files for i in range(-(-file.length // BLOCK))]

    @cached_property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the names of all rows, by those of the arrays and the bits, and of their lengths."""
        about = hashlib.sha256()
        for file in self.files:
            about.update(f"{file.name} {file.length} {file.row_nbytes}\n".encode(errors="surrogateescape"))
            about.update(file.chosen.tobytes())
        return about.hexdigest()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, at: int) -> Item: ...
    @overload
    def __getitem__(self, at: slice) -> list[Item]: ...
    def __getitem__(self, at: int | slice) -> Item | list[Item]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        position = at + len(self) if at < 0 else at
        if not 0 <= position < len(self):
            raise IndexError(at)
        index = int(np.searchsorted(self._starts, position, "right")) - 1
        file, block = self._blocks[index]
        return file.item(int(file.block(block)[position - self._starts[index]]))

    def __iter__(self) -> Iterator[Item]:
        return (batch.file.item(number) for batch in self.batches(BLOCK) for number in batch.numbers.tolist())

    def batches(self, size: int) -> Iterator[RowBatch]:
        """All rows, in order, at most `size` at a time; a batch is of one block of one array."""
        for file in self.files:
            for numbers in file.blocks():
                for start in range(0, len(numbers), size):
                    yield RowBatch(file, numbers[start : start + size])

    def run(self, start: int, stop: int) -> Rows:
        """The selected rows from one position to before another."""
        files, before = list[RowFile](), 0
        for file in self.files:
            first, last = start - before, stop - before  # positions among the rows of this array
            at = 0

            def within(numbers: Numbers, first: int = first, last: int = last) -> NDArray[np.bool_]:
                nonlocal at
                positions = np.arange(at, at + len(numbers))
                at += len(numbers)
                chosen: NDArray[np.bool_] = (positions >= first) & (positions < last)
                return chosen

            files.append(file.where(within))
            before += file.count
        return Rows(tuple(files))

    def where(self, predicate: Callable[[RowFile, Numbers], NDArray[np.bool_]]) -> Rows:
        """The selected rows that a predicate of an array and indices of rows is true of."""
        return Rows(tuple(file.where(partial(predicate, file)) for file in self.files))

    def without(self, other: Rows) -> Rows:
        """The selected rows that are not selected in `other`, which has the same arrays."""
        return Rows(tuple(one.without(two) for one, two in zip(self.files, other.files, strict=True)))

    def joined(self, other: Rows) -> Rows:
        """The rows that are selected here or in `other`, which has the same arrays."""
        pairs = zip(self.files, other.files, strict=True)
        return Rows(tuple(replace(one, chosen=one.chosen | two.chosen) for one, two in pairs))

    def limited(self, limit: int, seed: int) -> Rows:
        """At most `limit` rows, drawn by seed, name of the array and index."""
        return self if len(self) <= limit else Rows(limited_rows(self.files, limit, seed))


def limited_rows(files: Sequence[_File], limit: int, seed: int) -> tuple[_File, ...]:
    """Select fewer rows.

    Args:
        files: With more than `limit` selected rows.
        limit: How many remain selected, drawn by seed, name of the array and index.
        seed: Of the draw.
    """

    def keys() -> Iterator[NDArray[np.uint64]]:
        for file in files:
            for numbers in file.blocks():
                yield sample_keys(file.hashes(numbers), 1, seed)

    # The limit-th smallest key, without storing all keys: first its upper 16 bits.
    counts = np.cumsum(sum(np.bincount(_upper_bits(block), minlength=1 << 16) for block in keys()))
    upper = int(np.searchsorted(counts, limit))
    candidates = np.concatenate([block[_upper_bits(block) == upper] for block in keys()])
    rank = limit - (int(counts[upper]) - len(candidates)) - 1
    last = np.partition(candidates, rank)[rank]

    def drawn(file: RowFile, numbers: Numbers) -> NDArray[np.bool_]:
        chosen: NDArray[np.bool_] = sample_keys(file.hashes(numbers), 1, seed) <= last
        return chosen

    return tuple(file.where(partial(drawn, file)) for file in files)


def _upper_bits(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (keys >> np.uint64(48)).astype(np.int64)


def rows_of_items(items: Sequence[Item]) -> Tensor | None:
    """The stored values, (n, ...), of rows of arrays of one dtype; None for other items, and for none."""
    if isinstance(items, RowBatch):
        return items.file.stored(items.numbers) if len(items) else None
    rows = [item for item in items if isinstance(item, RowItem)]
    if not rows or len(rows) < len(items):
        return None
    parts = list[Tensor]()
    for file in dict.fromkeys(row.file for row in rows):
        parts.append(file.mapped()[torch.tensor([row.number for row in rows if row.file is file])])
    order = [i for file in dict.fromkeys(row.file for row in rows) for i, row in enumerate(rows) if row.file is file]
    return torch.cat(parts)[torch.tensor(order).argsort()]


def all_finite(values: Tensor) -> bool:
    """Whether all of at least one value are finite; in one pass and without a mask, as every batch is checked."""
    low, high = torch.aminmax(values)  # NaN if any value is
    return bool(low.isfinite() & high.isfinite())
