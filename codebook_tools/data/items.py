"""Items of data, images or audio clips, each under a unique name, and their listing from paths in order of name."""

from __future__ import annotations

import glob
import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from codebook_tools.data.sources import Source, file_and_entry, find_sources
from codebook_tools.errors import CodebookError, plain
from codebook_tools.runtime.hub_ids import data_set_id, is_uri
from codebook_tools.runtime.progress import Watch

if TYPE_CHECKING:
    from codebook_tools.data.modality import Modality

Values = NDArray[Any]
"""Decoded values of one item: pixels (channels, height, width), uint8 or float32 in [0, 1], or a waveform (channels,
samples) float32."""


@dataclass(frozen=True, eq=False, slots=True)
class Item:
    """One image or clip, not read yet.

    Attributes:
        name: Unique name: that of the source, or SOURCE#number where that holds several items.
        source: The bytes as stored, which clips of a file share.
        decode: Reads the values, in the item's own channels.
        group: Items of one group go into one split; None for an item on its own.
    """

    name: str
    source: Source = field(repr=False)
    decode: Callable[[], Values] = field(repr=False)
    group: str | None = None

    def __str__(self) -> str:
        """The name on one line, whatever is in it."""
        return plain(self.name)

    @property
    def kin(self) -> str:
        """Identifier of the group, or the name of an item without one."""
        return self.name if self.group is None else self.group

    @property
    def digest(self) -> bytes:
        """SHA-256 of the name, which decides which of the item's latents are sampled."""
        return name_sha256(self.name)

    def in_tenth(self, part: int) -> bool:
        """Whether `drawn` puts the item into a tenth of the data; those of part 0 and part 1 are independent."""
        return self.drawn(part) % 10 == 0

    def drawn(self, part: int) -> int:
        """Word `part` (0 to 3, 64 bits) of the SHA-256 of `kin`, the same for all items of a group."""
        return int.from_bytes(name_sha256(self.kin)[8 * part : 8 * part + 8], "big")


@dataclass(frozen=True, eq=False, slots=True)
class RaggedItem(Item):
    """An item that may be of another length than others.

    Attributes:
        shape: Of its values.
    """

    shape: tuple[int, ...] = field(default=())


def items_sha256(items: Iterable[Item]) -> str:
    """Hexadecimal SHA-256 of names and lengths in order; the location of the data has no influence."""
    if (own := getattr(items, "sha256", None)) is not None:
        return str(own)
    return name_sha256("\n".join(f"{item.name} {item.source.nbytes}" for item in items)).hex()


def name_sha256(names: str) -> bytes:
    """SHA-256 of names of files."""
    return hashlib.sha256(names.encode(errors="surrogateescape")).digest()  # names of files need not be UTF-8


@dataclass(frozen=True, eq=False)
class InMemory:
    """Items in memory, in place of a path.

    Attributes:
        values: (n, ...), one item per row.
        name: Prefix of the items' names.
    """

    values: NDArray[Any]
    name: str = "data"

    def __str__(self) -> str:
        return f"{self.name} {self.values.dtype} {'x'.join(map(str, self.values.shape))}"


def find_items(
    paths: Sequence[str | Path | InMemory], modality: Modality, watch: Watch | None = None, first: int | None = None
) -> Sequence[Item]:
    """List every item under the paths, in order of name, without reading any.

    Rows of an array, and clips of a file, are in the order of their numbers. Names that several paths share are
    prefixed by the name of the path, or by all of the path where that is shared too; their groups, and so their splits,
    stay the same.

    Args:
        paths: Folders of any depth, .tar shards, files, items in memory. A {0000..0009} in a path is a range, and *
            and ? stand for the files that match. FILE.npz:KEY and FILE.parquet:COLUMN name an entry of a file,
            hf://datasets/ORG/NAME[:SPLIT][:COLUMN] a column of a data set on the hub.
        modality: The kind of data.
        watch: Is told the rows that are read of such a data set, which is read whole.
        first: So many of its rows at most are read, the first ones.

    Raises:
        CodebookError: A path is missing, of no known kind, cannot be listed, holds no item, or is listed twice.
    """
    remote = [asked for path in paths if not isinstance(path, InMemory) and (asked := data_set_id(path))]
    if odd := [path for path in paths if not isinstance(path, InMemory) and is_uri(path) and not data_set_id(path)]:
        raise CodebookError(f"{odd[0]}: expected hf://datasets/org/name[@revision][:split][:column]")
    groups: list[tuple[Path, Sequence[Item]]] = [
        (path, _items(path, modality))
        for pattern in paths
        if not isinstance(pattern, InMemory) and not data_set_id(pattern)
        for named in _paths(str(pattern))
        for path in _files_in(named, modality)
    ]
    groups += [(Path(data.name), modality.rows(data.name, data.values)) for data in paths if isinstance(data, InMemory)]
    if remote:
        from codebook_tools.data.hub import hub_items

        groups += [(Path(str(asked)), hub_items(asked, modality, watch or Watch(), first)) for asked in remote]
    for path, items in groups:
        if not items:
            endings = (*modality.suffixes, _TABLE) if _TABLE in modality.archives else modality.suffixes
            raise CodebookError(f"no {modality.many} in {path}: expected files ending in {', '.join(endings)}")
    return modality.joined([(_label(path), path.as_posix(), items) for path, items in groups])


def _files_in(path: Path, modality: Modality) -> list[Path]:
    """The path; of a folder, where items come from archives alone, those in it."""
    file, entry = file_and_entry(path)
    if modality.suffixes or not file.is_dir():
        return [path]
    files = [file / source.name for source in find_sources(file, tuple(modality.archives)) or ()]
    if not files:
        raise CodebookError(f"no {modality.many} in {path}: expected files ending in {', '.join(modality.archives)}")
    return [one if entry is None else Path(f"{one}:{entry}") for one in files]


def joined_by_name(groups: Sequence[tuple[str, str, Sequence[Item]]]) -> list[Item]:
    """The items of several paths in order of name, under unique names; see `Modality.joined`."""
    shared = Counter(kin for _, _, items in groups for kin in {item.kin for item in items})
    fronts = Counter(label for label, _, _ in groups)
    named: dict[str, Item] = {}
    for label, path, items in groups:
        front = label if fronts[label] == 1 else path
        for item in items:
            if shared[item.kin] > 1:
                item = replace(item, name=f"{front}/{item.name}", group=item.kin)
            if item.name in named:
                raise CodebookError(f"{item.name} stands twice in the data; give each path once")
            named[item.name] = item
    return in_order(named.values())


def in_order(items: Iterable[Item]) -> list[Item]:
    """The items in order of name; rows of one array, and clips of one file, in the order of their numbers."""
    return sorted(items, key=_by_number)


def _by_number(item: Item) -> tuple[str, int, str]:
    front, _, number = item.name.rpartition("#")
    return (front, int(number), "") if number.isascii() and number.isdigit() else (item.name, -1, item.name)


def _label(path: Path) -> str:
    """The name of a path, with the entry that it names."""
    file, entry = file_and_entry(path)
    return file.name if entry is None else f"{file.name}:{entry}"


def _paths(pattern: str) -> Iterator[Path]:
    """The paths that a pattern with ranges, * and ? stands for."""
    for path in _braces(pattern):
        file, entry = file_and_entry(path)
        if not any(mark in str(file) for mark in "*?") or os.path.lexists(file):
            yield path
            continue
        matches = sorted(glob.glob(str(file), recursive=True))
        if not matches:
            raise CodebookError(f"no file matches {file}")
        yield from (Path(match if entry is None else f"{match}:{entry}") for match in matches)


_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
_MOST_PATHS = 1_000_000  # of all ranges: the largest public data sets have a quarter of that in tar shards


def _braces(pattern: str) -> Iterator[Path]:
    """The paths that a pattern with ranges stands for."""
    head, *rest = _RANGE.split(pattern)  # text, and between its pieces the two ends of each range
    ranges = list(zip(rest[::3], rest[1::3], strict=True))
    count = math.prod(abs(int(first) - int(last)) + 1 for first, last in ranges)
    if count > _MOST_PATHS:
        raise CodebookError(f"{pattern} stands for {count:,} paths, more than {_MOST_PATHS:,}; give their folder")
    for numbers in product(*(_numbers(*ends) for ends in ranges)):
        yield Path(head + "".join(number + text for number, text in zip(numbers, rest[2::3], strict=True)))


def _numbers(*ends: str) -> list[str]:
    low, high = sorted(map(int, ends))
    padded = any(end != "0" and end.startswith("0") for end in ends)  # as in a shell: {08..11} is padded, {8..11} not
    width = max(map(len, ends)) if padded else 1
    return [f"{n:0{width}d}" for n in range(low, high + 1)]


def _items(path: Path, modality: Modality) -> Sequence[Item]:
    file, entry = file_and_entry(path)
    sources = find_sources(file, modality.suffixes)
    if file.is_dir() and not (sources and entry is None):
        return _in_tables(file, entry, modality)
    if sources is not None:
        return [item for source in sources for item in modality.items(source)]
    archive = modality.archives.get(file.suffix.lower())
    if archive is None:
        endings = ", ".join((".tar", *modality.archives, *modality.suffixes))
        raise CodebookError(
            f"{path} is no {modality.one} source: give a folder of {modality.many}, or a file ending in {endings}"
        )
    return archive(path)


_TABLE = ".parquet"  # which data sets are stored in by the folder, too


def _in_tables(folder: Path, entry: str | None, modality: Modality) -> list[Item]:
    """The items of the tables in a folder, named by their path within it."""
    read, items = modality.archives.get(_TABLE), list[Item]()
    if read is None:
        return items
    for table in find_sources(folder, (_TABLE,)) or ():
        path = folder / table.name
        within = table.name.removesuffix(path.name)
        named = read(path if entry is None else Path(f"{path}:{entry}"))
        items += [replace(item, name=within + item.name) for item in named]
    return items
