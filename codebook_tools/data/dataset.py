"""Items of any modality as batches of tensors; unreadable items raise an error, or are recorded and left out."""

from __future__ import annotations

import ctypes
import signal
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor

from codebook_tools.data.channels import MIXINGS
from codebook_tools.data.items import Item, RaggedItem, Values
from codebook_tools.data.modality import Modality
from codebook_tools.data.rows import Rows, all_finite, rows_of_items
from codebook_tools.errors import CodebookError, one_line
from codebook_tools.runtime.progress import Watch

CACHE_BYTES = 2 << 30
"""Bytes of decoded values that are cached at most."""

VALUES_AT_ONCE = 1 << 18
"""Values in a batch of small items: fewer would spend more time on each batch than on what is in it."""

Decoded = Values | Exception
"""The values of an item, or the reason why it cannot be read."""


class ChannelsError(CodebookError):
    """An item has other channels than the network takes. It is not damaged, so skip_bad does not skip it."""


@dataclass(frozen=True)
class Beyond:
    """Values of an item beyond full scale.

    Attributes:
        count: How many there are.
        values: All values of the item.
        peak: Largest absolute value.
    """

    count: int
    values: int
    peak: float


@dataclass
class _Cache:
    values: dict[Item, Tensor] = field(default_factory=dict)
    nbytes: int = 0
    limit: int = field(default_factory=lambda: CACHE_BYTES)

    def add(self, item: Item, values: Tensor) -> None:
        """Keep the values where they fit the limit."""
        if self.nbytes + values.nbytes <= self.limit:
            self.values[item] = values
            self.nbytes += values.nbytes


@dataclass
class Media:
    """Items as tensors, decoded once while they fit the cache and at each reading otherwise.

    Attributes:
        items: The items, in the order of batches.
        modality: How the network takes them.
        skip_bad: Leave out unreadable items, for which CodebookError is raised otherwise.
        watch: Is told the time spent on loading.
        part: Index and number of parts: `batches` gives every n-th batch, and other processes the rest.
        workers: Processes that decode ahead; with 0 this process decodes on demand.
        pinned: Whether batches lie in page-locked memory, for copies to a GPU.
        bad: Reasons by name of the items left out.
        mixing: How surplus channels are reduced, of channels.MIXINGS; with None an item whose channels cannot be
            converted without loss raises CodebookError.
        beyond: Values beyond full scale, by name of the item.
    """

    items: Sequence[Item]
    modality: Modality
    skip_bad: bool = False
    watch: Watch = field(default_factory=Watch, repr=False)
    part: tuple[int, int] = (0, 1)
    workers: int = 0
    pinned: bool = False
    bad: dict[str, str] = field(default_factory=dict)
    mixing: str | None = None
    beyond: dict[str, Beyond] = field(default_factory=dict, repr=False)
    _cache: _Cache = field(default_factory=_Cache, repr=False)
    _first: tuple[Item, tuple[int, ...]] | None = None

    def __len__(self) -> int:
        return len(self.items)

    def subset(self, items: Sequence[Item]) -> Self:
        """A copy restricted to `items`, which shares the cache and the records of bad items."""
        subset = copy(self)
        subset.items = items
        return subset

    def whole(self) -> Self:
        """A copy that gives all batches, whatever the part of this one."""
        whole = copy(self)
        whole.part = (0, 1)
        return whole

    def keep(self, nbytes: int) -> None:
        """Limit the cache to so many bytes, for all that share it; 0 where no item is read twice."""
        self._cache.limit = nbytes
        if self._cache.nbytes > nbytes:
            self._cache.values.clear()
            self._cache.nbytes = 0

    def batches(self, size: int) -> Iterator[tuple[Sequence[Item], Tensor]]:
        """The batches of this part, in order.

        Args:
            size: Items per batch, unreadable ones included.

        Returns:
            Items and values as `load` returns them; batches without a readable item are left out. The batches of all
            parts together are those of the whole. Items of unlike length are in batches of one length, near each
            other.
        """
        index, parts = self.part
        if isinstance(self.items, Rows):
            batches: Iterator[tuple[Sequence[Item], Tensor]] = (
                self.load(rows) for rows in islice(self.items.batches(size), index, None, parts)
            )
        else:
            lots = self.alike(range(len(self.items)), size, window=_WINDOW)
            batches = self.stream(islice(lots, index, None, parts))
        return ((items, values) for items, values in batches if items)

    def at_once(self, least: int) -> int:
        """Items in a batch of a pass: `least`, or of small rows of arrays as many as have VALUES_AT_ONCE values."""
        if not isinstance(self.items, Rows) or not len(self.items):
            return least
        return max(least, VALUES_AT_ONCE // self.items.files[0].mapped()[0].numel())

    @property
    def ragged(self) -> bool:
        """Whether items differ in length."""
        return not isinstance(self.items, Rows) and len({_shape_of(item) for item in self.items}) > 1

    def alike(self, places: Sequence[int], size: int, window: int | None = None) -> Iterator[Sequence[int]]:
        """Divide positions of items into batches, each of items of one length.

        Args:
            places: Positions in `items`.
            size: Of a batch at most; shorter ones hold what is left.
            window: So many batches at a time are arranged by length; None for all.
        """
        if not self.ragged:
            yield from (places[start : start + size] for start in range(0, len(places), size))
            return
        step = len(places) if window is None else window * size
        for start in range(0, len(places), step):
            by_length = dict[tuple[int, ...], list[int]]()
            for place in places[start : start + step]:
                lot = by_length.setdefault(_shape_of(self.items[place]), [])
                lot.append(place)
                if len(lot) == size:
                    yield list(lot)
                    lot.clear()
            yield from (lot for lot in by_length.values() if lot)

    def stream(self, places: Iterable[Sequence[int]]) -> Iterator[tuple[Sequence[Item], Tensor]]:
        """Load batches of items by their positions in `items`, which the workers decode some batches ahead."""
        ahead = self.workers and not isinstance(self.items, Rows) and any(not self._known(item) for item in self.items)
        for items, decoded in self._ahead(places) if ahead else ((self._at(batch), {}) for batch in places):
            yield self._batch(items, decoded)

    def load(self, items: Sequence[Item]) -> tuple[Sequence[Item], Tensor]:
        """Load a batch.

        Args:
            items: Of this source, in any order.

        Returns:
            The readable items, and their values (n, channels, ...) float32: images in [0, 1], waveforms with 1 at full
            scale; arrays as the network takes them. Without any readable item an empty list and an empty tensor.

        Raises:
            CodebookError: An item cannot be read and skip_bad is off, none of the source can be read, an item has other
                channels than the network takes, or items have unlike shapes.
        """
        return self._batch(items, {})

    def _at(self, places: Sequence[int]) -> list[Item]:
        return [self.items[place] for place in places]

    def _batch(self, items: Sequence[Item], decoded: dict[Item, Decoded]) -> tuple[Sequence[Item], Tensor]:
        """As `load`. decoded: what workers have made of some of the items."""
        with self.watch.phase("load"):
            if (stored := rows_of_items(items)) is not None:
                items, rows = self._finite(items, self.modality.batched(stored))
                return items, rows.pin_memory() if self.pinned and len(items) else rows
            loaded = [(item, values) for item in items if (values := self._values(item, decoded)) is not None]
            if not loaded:
                return [], torch.empty(0)
            stacked = self.modality.stacked([values for _, values in loaded])
            return [item for item, _ in loaded], stacked.pin_memory() if self.pinned else stacked

    def _finite(self, items: Sequence[Item], values: Tensor) -> tuple[Sequence[Item], Tensor]:
        """Rows without those that hold a value which is not finite."""
        if not values.is_floating_point() or all_finite(values):
            return items, values
        finite = torch.isfinite(values).flatten(1).all(1)
        for at in (~finite).nonzero()[:, 0].tolist():
            self._leave_out(items[at], ValueError("a value is not finite"))
        return [items[at] for at in finite.nonzero()[:, 0].tolist()], values[finite]

    def _ahead(self, places: Iterable[Sequence[int]]) -> Iterator[tuple[list[Item], dict[Item, Decoded]]]:
        """Batches of items, and what the workers made of those that were neither cached nor known as bad."""
        from torch.utils.data import DataLoader

        drawn = deque[tuple[list[Item], list[int]]]()

        def wanted() -> Iterator[list[int]]:
            for batch in places:
                items = self._at(batch)
                unknown = [place for place, item in zip(batch, items, strict=True) if not self._known(item)]
                drawn.append((items, unknown))
                yield unknown

        decoding: Any = _Decoding(self)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of more workers than cores, which the user set
            loader: Any = DataLoader(
                decoding,
                batch_size=None,
                sampler=wanted(),
                num_workers=self.workers,
                collate_fn=list,  # the default puts tensors into shared memory, of which containers have little
                generator=torch.Generator(),  # the loader draws a seed for its workers, not from the global generator
                multiprocessing_context=_CONTEXT,
                worker_init_fn=_end_with_parent,
            )
            batches = iter(loader)
        while True:
            with self.watch.phase("load"):
                decoded = next(batches, None)
            if decoded is None:
                return
            items, unknown = drawn.popleft()
            yield items, dict(zip(self._at(unknown), decoded, strict=True))

    def _known(self, item: Item) -> bool:
        return item in self._cache.values or item.name in self.bad

    def _values(self, item: Item, decoded: dict[Item, Decoded]) -> Tensor | None:
        """The item's values from the cache, the workers or its file; None where it is left out."""
        if self._known(item):
            return self._cache.values.get(item)
        result = decoded[item] if item in decoded else self.decode(item)
        if isinstance(result, Exception):
            self._leave_out(item, result)
            return None
        values = torch.tensor(result)
        ragged = isinstance(item, RaggedItem)
        if ragged and not (values.numel() and (not values.is_floating_point() or all_finite(values))):
            why = "a value is not finite" if values.numel() else "it holds no value"
            self._leave_out(item, ValueError(why))
            return None
        first, shape = self._first = self._first or (item, tuple(values.shape))
        if tuple(values.shape) != shape and not (ragged and values.ndim == len(shape)):
            this, other = map(self.modality.written, (values.shape, shape))
            raise CodebookError(
                f"{self.modality.many} of unlike sizes: {item} is {this}, {first} is {other}; {self.modality.remedy}"
            )
        full = self.modality.full
        if full is not None and (peak := float(values.abs().max())) > full:
            self.beyond[item.name] = Beyond(int((values.abs() > full).sum()), values.numel(), peak)
        self._cache.add(item, values)
        return values

    def decode(self, item: Item) -> Decoded:
        """The item's values in the network's channels and shape, uint8 or float32 as stored, or the error."""
        try:
            stored = item.decode()
            values = self.modality.in_channels(stored, self.mixing)
            if values is not None:
                return self.modality.fitted(values)
        except Exception as error:  # decoders raise whatever they like on a damaged file
            return error
        return ChannelsError(
            f"{self.modality.one} {item} has {len(stored)} channels, and the network takes {self.modality.channels}: "
            f"give --channels {'|'.join(MIXINGS)} ({self.modality.mixes})"
        )

    def _leave_out(self, item: Item, error: Exception) -> None:
        """Record a bad item where skip_bad is on and others are readable, else raise."""
        if isinstance(error, ChannelsError):
            raise error
        reason, one, many = one_line(error), self.modality.one, self.modality.many
        if not self.skip_bad:
            raise CodebookError(f"cannot read {one} {item}: {reason}; --skip-bad goes on without it") from error
        self.bad[item.name] = reason
        if len(self.bad) >= len(self.items) and all(item.name in self.bad for item in self.items):
            raise CodebookError(f"none of the {len(self)} {many} can be read, the last one {item}: {reason}") from error


def _shape_of(item: Item) -> tuple[int, ...]:
    """The shape of an item that may differ in length; empty for others."""
    return item.shape if isinstance(item, RaggedItem) else ()


_WINDOW = 64  # batches: items of unlike length are near their place in the order of names

_CONTEXT = "fork" if "fork" in torch.multiprocessing.get_all_start_methods() else None
"""How workers start: a fork has the items at once, where other methods would pickle every one."""


def _end_with_parent(worker: int) -> None:
    """End a worker whose parent is killed, which would wait for ever; only Linux can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


_SET_PARENT_DEATH_SIGNAL = 1  # of <linux/prctl.h>


class _Decoding:
    """The data set of the workers: from positions in `media.items` to decoded items."""

    def __init__(self, media: Media) -> None:
        self._media = media

    def __getitem__(self, places: list[int]) -> list[Decoded]:
        return [_picklable(self._media.decode(self._media.items[place])) for place in places]


def _picklable(decoded: Decoded) -> Decoded:
    """An error as text alone, as exceptions of decoders may hold what cannot be sent between processes."""
    if isinstance(decoded, Exception) and not isinstance(decoded, ChannelsError):
        return ValueError(one_line(decoded))
    return decoded
