"""Train, validation and test splits by hashes of names, and random subsets of items."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from codebook_tools.data.items import Item
from codebook_tools.data.sources import Source
from codebook_tools.errors import CodebookError


@dataclass(frozen=True)
class Splits:
    """Disjoint lists of items.

    Attributes:
        train: For gradients.
        validation: Chooses the kept state of a fine-tuning.
        test: Only reported on.
    """

    train: list[Item]
    validation: list[Item]
    test: list[Item]

    @property
    def calibration(self) -> list[Item]:
        """Train and validation items in order of name, for counts and k-means."""
        return sorted([*self.train, *self.validation], key=lambda item: item.name)


def split(data: list[Item], test: list[Item] | None = None, *, many: str = "images", has_more: bool = False) -> Splits:
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
            count, groups = len(data) + len(test), len({item.kin for item in [*data, *test]})
            of = f"{count} {many}" if groups == count else f"{count} {many} in {groups} groups that stay together"
            more = "raise --limit" if has_more else f"give more {many} with --data"
            raise CodebookError(
                f"the {name} split of {of} is empty: a tenth is drawn by name; "
                f"{more}, or give the test {many} with --test-data"
            )
    return Splits(train, validation, test)


def _parted(items: list[Item], part: int, least: int) -> tuple[list[Item], list[Item]]:
    """All but a tenth, and that tenth; neither is empty where there are `least` groups or more."""
    tenth = {item.kin for item in items if item.in_tenth(part)}
    groups = {item.kin: item.drawn(part) for item in items}
    if len(groups) >= least and len(tenth) in (0, len(groups)):
        tenth = {min(groups, key=lambda kin: (groups[kin], kin))}
    return [item for item in items if item.kin not in tenth], [item for item in items if item.kin in tenth]


def _refuse_shared(data: list[Item], test: list[Item]) -> None:
    """Raise CodebookError for test items that are also in the data; only sources of one length are read, if known."""
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


def shuffled(items: list[Item], seed: int) -> list[Item]:
    """The items in a random order that depends only on seed and names."""
    salt = (seed % 2**64).to_bytes(8, "big")
    return sorted(items, key=lambda item: hashlib.sha256(salt + item.digest).digest())


def limited(items: list[Item], limit: int | None, seed: int) -> list[Item]:
    """At most `limit` items, drawn by seed and name: the first ones of `shuffled`, in order of name."""
    if limit is None or len(items) <= limit:
        return items
    return sorted(shuffled(items, seed)[:limit], key=lambda item: item.name)
