"""Items as batches of tensors, whatever their medium; what cannot be read is named, or counted and left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from codebook_tools.errors import CodebookError, one_line
from codebook_tools.items import Item, Medium
from codebook_tools.watch import Watch

CACHE_BYTES = 2 << 30
"""Decoded values are kept up to this many bytes."""


@dataclass
class _Cache:
    values: dict[Item, Tensor] = field(default_factory=dict)
    nbytes: int = 0

    def add(self, item: Item, values: Tensor) -> None:
        """Keep it where there is room."""
        if self.nbytes + values.nbytes <= CACHE_BYTES:
            self.values[item] = values
            self.nbytes += values.nbytes


@dataclass
class Media:
    """Items as tensors, decoded once while they fit CACHE_BYTES and again each time beyond that.

    channels: 1 or 3 of images, any number of waveforms. skip_bad: leave out what cannot be read, where CodebookError is
    raised otherwise. part: which of how many parts of the batches a pass over them sees, where others see the rest.
    bad: names of items left out, and the reasons.
    """

    items: list[Item]
    medium: Medium
    channels: int
    skip_bad: bool = False
    watch: Watch = field(default_factory=Watch, repr=False)
    part: tuple[int, int] = (0, 1)
    bad: dict[str, str] = field(default_factory=dict)
    _cache: _Cache = field(default_factory=_Cache, repr=False)
    _first: tuple[Item, tuple[int, ...]] | None = None

    def __len__(self) -> int:
        return len(self.items)

    def subset(self, items: list[Item]) -> Self:
        """The same source restricted to `items`; decoded values and the list of bad items are shared."""
        part = copy(self)
        part.items = items
        return part

    def whole(self) -> Self:
        """The same source, all of it, whatever part this is."""
        whole = copy(self)
        whole.part = (0, 1)
        return whole

    def batches(self, size: int) -> Iterator[tuple[list[Item], Tensor]]:
        """Items and their values as `load` returns them, in order, `size` at a time; those of `part` alone, so that the
        batches of all parts together are those of the whole."""
        mine, parts = self.part
        for start in range(mine * size, len(self.items), parts * size):
            items, values = self.load(self.items[start : start + size])
            if items:
                yield items, values

    def load(self, items: Sequence[Item]) -> tuple[list[Item], Tensor]:
        """The readable ones of `items` and their values, float32: images (n, channels, height, width) in [0, 1], or
        waveforms (n, channels, samples) in [-1, 1]."""
        with self.watch.phase("load"):
            loaded = [(item, values) for item in items if (values := self._values(item)) is not None]
            if not loaded:
                return [], torch.empty(0)
            stacked = torch.stack([values for _, values in loaded])
            return [item for item, _ in loaded], stacked.float().div_(self.medium.unit)

    def _values(self, item: Item) -> Tensor | None:
        values = self._cache.values.get(item)
        if values is not None:
            return values
        if item.name in self.bad:
            return None
        try:
            values = torch.tensor(self.medium.fitted(item.decode(self.channels)))
        except Exception as error:  # decoders raise whatever they like on a damaged file
            self._leave_out(item, error)
            return None
        first, shape = self._first = self._first or (item, tuple(values.shape))
        if tuple(values.shape) != shape:
            this, other = ("x".join(map(str, reversed(sides))) for sides in (values.shape[1:], shape[1:]))
            raise CodebookError(
                f"{self.medium.many} of unlike sizes: {item} is {this}, {first} is {other}; give --size"
            )
        self._cache.add(item, values)
        return values

    def _leave_out(self, item: Item, error: Exception) -> None:
        reason, one, many = one_line(error), self.medium.one, self.medium.many
        if not self.skip_bad:
            raise CodebookError(f"cannot read {one} {item}: {reason}; --skip-bad goes on without it") from error
        self.bad[item.name] = reason
        if len(self.bad) >= len(self.items) and all(item.name in self.bad for item in self.items):
            raise CodebookError(f"none of the {len(self)} {many} can be read, the last one {item}: {reason}") from error
