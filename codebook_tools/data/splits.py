"""Train, validation and test splits by hashes of names, and random subsets of items."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from codebook_tools.data.items import Item, in_order
from codebook_tools.data.rows import BLOCK, Rows
from codebook_tools.data.shared_rows import refuse_shared_rows
from codebook_tools.data.sources import Source
from codebook_tools.errors import CodebookError


@dataclass(frozen=True)
class Splits:
    """Disjoint lists of items.

    Attributes:
        train: For gradients; Rows where the data are arrays, as the others.
        validation: Chooses the kept state of a fine-tuning.
        test: Only reported on.
    """

    train: Sequence[Item]
    validation: Sequence[Item]
    test: Sequence[Item]

    @property
    def calibration(self) -> Sequence[Item]:
        """Train and validation items in order of name, for counts and k-means."""
        if isinstance(self.train, Rows):
            return self.train.joined(self.validation) if isinstance(self.validation, Rows) else self.train
        return in_order([*self.train, *self.validation])


def split(
    data: Sequence[Item], test: Sequence[Item] | None = None, *, many: str = "images", has_more: bool = False
) -> Splits:
    """Split items into train, validation and test.

    Test and validation are a tenth each, chosen by SHA-256 of the name of an item, or of its group, so that an item
    never changes sides. A tenth of few is one item or group, provided there are at least three of them for a test, and
    two for validation; the validation split may be empty.

    Args:
        data: All items, or the calibration items where `test` is given.
        test: Explicit test items.
        many: What items are called in messages.
        has_more: Whether there are more items, which --limit left out.

    Raises:
        CodebookError: The test or the calibration split is empty, or an explicit test item is stored in the same bytes
            as a calibration item.
    """
    if test is None:
        data, test = _parted(data, 0, least=3)
    else:
        _refuse_shared(data, test)
    train, validation = _parted(data, 1, least=2)
    for name, items in (("test", test), ("calibration", data)):
        if not items:
            count = len(data) + len(test)
            groups = len({item.kin for item in [*data[:_FEW], *test[:_FEW]]}) if count <= _FEW else count
            of = f"{count} {many}" if groups == count else f"{count} {many} in {groups} groups that stay together"
            more = "raise --limit" if has_more else f"give more {many} with --data"
            raise CodebookError(
                f"the {name} split of {of} is empty: a tenth is drawn by name; "
                f"{more}, or give the test {many} with --test-data"
            )
    return Splits(train, validation, test)


_FEW = 1000  # items whose groups are counted for a message: a split of more is empty only where groups are few


def _parted(items: Sequence[Item], part: int, least: int) -> tuple[Sequence[Item], Sequence[Item]]:
    """All but a tenth, and that tenth; neither is empty where there are `least` groups or more."""
    if isinstance(items, Rows):
        return _parted_rows(items, part, least)
    tenth = {item.kin for item in items if item.in_tenth(part)}
    groups = {item.kin: item.drawn(part) for item in items}
    if len(groups) >= least and len(tenth) in (0, len(groups)):
        tenth = {min(groups, key=lambda kin: (groups[kin], kin))}
    return [item for item in items if item.kin not in tenth], [item for item in items if item.kin in tenth]


def _parted_rows(rows: Rows, part: int, least: int) -> tuple[Rows, Rows]:
    tenth = rows.where(lambda file, numbers: file.in_tenth(part, numbers))
    if len(tenth) in (0, len(rows)):
        groups = {word for batch in rows.batches(BLOCK) for word in batch.file.words(batch.numbers, part).tolist()}
        if len(groups) >= least:
            first = np.uint64(min(groups))
            tenth = rows.where(lambda file, numbers: file.words(numbers, part) == first)
    return rows.without(tenth), tenth


def _refuse_shared(data: Sequence[Item], test: Sequence[Item]) -> None:
    """Raise CodebookError for test items that are also in the data; only sources of one length are read, if known."""
    if isinstance(data, Rows) and isinstance(test, Rows):
        refuse_shared_rows(data, test)
        return
    known_as, tested_as = ({item.source: item.name for item in reversed(items)} for items in (data, test))
    sizes = {source.nbytes for source in known_as} & {source.nbytes for source in tested_as} - {0}
    if not all(source.exact for source in [*known_as, *tested_as]):
        sizes = {source.nbytes for source in [*known_as, *tested_as]} - {0}
    known = {_content(source): name for source, name in known_as.items() if source.nbytes in sizes}
    for source, name in tested_as.items():
        if source.nbytes in sizes and (content := _content(source)) is not None and content in known:
            raise CodebookError(
                f"test item {name} is also in --data, as {known[content]}: take it out of --data, "
                "or leave out --test-data to have a tenth split off"
            )


def _content(source: Source) -> bytes | None:
    """SHA-256 of the bytes; None where they cannot be read, which decoding will report."""
    try:
        return hashlib.sha256(source.read()).digest()
    except (OSError, ValueError):
        return None


def shuffled(items: Sequence[Item], seed: int, limit: int | None = None) -> list[Item]:
    """The items, or `limit` of them, in a random order that depends only on seed and names."""
    if isinstance(items, Rows) and limit is not None:
        items = items.limited(limit, seed)
    salt = (seed % 2**64).to_bytes(8, "big")
    return sorted(items, key=lambda item: hashlib.sha256(salt + item.digest).digest())[:limit]


def limited(items: Sequence[Item], limit: int | None, seed: int) -> Sequence[Item]:
    """At most `limit` items, drawn by seed and name: the first ones of `shuffled`, in order of name."""
    if limit is None or len(items) <= limit:
        return items
    if isinstance(items, Rows):
        return items.limited(limit, seed)
    return in_order(shuffled(items, seed, limit))
