"""Items of data, images or clips of sound: each with a name, found in folders, tars and files, in order of name."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from codebook_tools.data.sources import Source, find_sources
from codebook_tools.errors import CodebookError, plain

if TYPE_CHECKING:
    from codebook_tools.data.modality import Modality

Values = NDArray[Any]
"""Decoded values of one item: pixels (channels, height, width), uint8 or float32 in [0, 1], or a waveform (channels,
samples) float32."""


@dataclass(frozen=True, eq=False, slots=True)
class Item:
    """One image or clip, not read yet.

    name: of its source, or SOURCE#number where that holds several. source: its bytes as stored, which clips of a file
    share. decode: its values, in the channels that it has. group: items of one group go into one split; by default each
    is its own.
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
        """What all items of its group share, and no other item."""
        return self.name if self.group is None else self.group

    @property
    def digest(self) -> bytes:
        """SHA-256 of the name: it seeds the choice of the item's latents."""
        return _sha256(self.name)

    def in_tenth(self, part: int) -> bool:
        """Whether the SHA-256 of name or group puts the item into this tenth; the parts 0 and 1 are independent."""
        return self.drawn(part) % 10 == 0

    def drawn(self, part: int) -> int:
        """The number that decides that: the same for all items of a group."""
        return int.from_bytes(_sha256(self.kin)[8 * part : 8 * part + 8], "big")


def items_sha256(items: Iterable[Item]) -> str:
    """Of their names and lengths, in their order: the same data in another place are the same."""
    return _sha256("\n".join(f"{item.name} {item.source.nbytes}" for item in items)).hex()


def _sha256(names: str) -> bytes:
    return hashlib.sha256(names.encode(errors="surrogateescape")).digest()  # names of files need not be UTF-8


@dataclass(frozen=True, eq=False)
class InMemory:
    """Items that a program holds, in place of a path. values: (n, ...), one item a row. name: in front of theirs."""

    values: NDArray[Any]
    name: str = "data"

    def __str__(self) -> str:
        return f"{self.name} {self.values.dtype} {'x'.join(map(str, self.values.shape))}"


def find_items(paths: Sequence[str | Path | InMemory], modality: Modality) -> list[Item]:
    """Every item under the paths, in order of name: folders of any depth, .tar shards, single files.

    A {0000..0009} in a path stands for that range. Names that several paths share get the path's own name in front,
    or all of the path where that is shared too; they keep their place in the splits. Whether an item can be read shows
    when it is. Raises CodebookError where a path is missing, of no known kind, cannot be listed, holds no item, or is
    given twice.
    """
    groups = [
        (path, _items(path, modality))
        for given in paths
        if not isinstance(given, InMemory)
        for path in _braces(str(given))
    ]
    groups += [(Path(held.name), modality.rows(held.name, held.values)) for held in paths if isinstance(held, InMemory)]
    for path, items in groups:
        if not items:
            raise CodebookError(
                f"no {modality.many} in {path}: expected files ending in {', '.join(modality.suffixes)}"
            )
    shared = Counter(kin for _, items in groups for kin in {item.kin for item in items})
    fronts = Counter(path.name for path, _ in groups)
    named: dict[str, Item] = {}
    for path, items in groups:
        front = path.name if fronts[path.name] == 1 else path.as_posix()
        for item in items:
            if shared[item.kin] > 1:
                item = replace(item, name=f"{front}/{item.name}", group=item.kin)
            if item.name in named:
                raise CodebookError(f"{item.name} stands twice in the data; give each path once")
            named[item.name] = item
    return [named[name] for name in sorted(named)]


_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
_MOST_PATHS = 1_000_000  # that ranges stand for: the largest public data sets have a quarter of that in tar shards


def _braces(given: str) -> Iterator[Path]:
    head, *rest = _RANGE.split(given)  # texts, and between them the two ends of each range
    ranges = list(zip(rest[::3], rest[1::3], strict=True))
    several = math.prod(abs(int(first) - int(last)) + 1 for first, last in ranges)
    if several > _MOST_PATHS:
        raise CodebookError(f"{given} stands for {several:,} paths, more than {_MOST_PATHS:,}; give their folder")
    for numbers in product(*(_numbers(*ends) for ends in ranges)):
        yield Path(head + "".join(number + text for number, text in zip(numbers, rest[2::3], strict=True)))


def _numbers(*ends: str) -> list[str]:
    low, high = sorted(map(int, ends))
    padded = any(end != "0" and end.startswith("0") for end in ends)  # as a shell pads: {8..11}, but {08..11}
    width = max(map(len, ends)) if padded else 1
    return [f"{n:0{width}d}" for n in range(low, high + 1)]


def _items(path: Path, modality: Modality) -> list[Item]:
    sources = find_sources(path, modality.suffixes)
    if sources is not None:
        return [item for source in sources for item in modality.items(source)]
    archive = modality.archives.get(path.suffix.lower())
    if archive is None:
        endings = ", ".join((".tar", *modality.archives, *modality.suffixes))
        raise CodebookError(
            f"{path} is no {modality.one} source: give a folder of {modality.many}, or a file ending in {endings}"
        )
    return archive(path)
