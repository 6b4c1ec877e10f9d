"""Items as batches of tensors, whatever their modality; what cannot be read is named, or counted and left out."""

from __future__ import annotations

import ctypes
import signal
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from codebook_tools.data.channels import MIXINGS
from codebook_tools.data.items import Item, Values
from codebook_tools.data.modality import Modality
from codebook_tools.errors import CodebookError, one_line
from codebook_tools.runtime.progress import Watch

CACHE_BYTES = 2 << 30
"""Decoded values are kept up to this many bytes."""

Decoded = Values | Exception
"""Of one item: what it holds, or why it cannot be read."""


class ChannelsError(CodebookError):
    """An item has other channels than the network takes. It is not damaged: nothing goes on without it."""


@dataclass(frozen=True)
class Beyond:
    """How many values of an item lie beyond full scale, of how many in all, and the farthest of them."""

    count: int
    values: int
    peak: float


@dataclass
class _Cache:
    values: dict[Item, Tensor] = field(default_factory=dict)
    nbytes: int = 0
    limit: int = field(default_factory=lambda: CACHE_BYTES)

    def add(self, item: Item, values: Tensor) -> None:
        """Keep it where there is room."""
        if self.nbytes + values.nbytes <= self.limit:
            self.values[item] = values
            self.nbytes += values.nbytes


@dataclass
class Media:
    """Items as tensors, decoded once while they fit CACHE_BYTES and again each time beyond that.

    modality: how the network takes them. mixing: of channels.MIXINGS, what becomes of items with other channels; None:
    CodebookError is raised for what cannot be converted without a loss. skip_bad: leave out what cannot be read,
    where CodebookError is raised otherwise. part: which of how many parts of the batches a pass over them sees, where
    others see the rest. workers: processes that decode ahead; 0: this one does, when asked. pinned: batches lie in
    memory that a GPU copies from by itself. bad: names of items left out, and the reasons. beyond: by name of the item,
    what of it lies beyond full scale.
    """

    items: list[Item]
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

    def keep(self, nbytes: int) -> None:
        """Keep so many bytes of decoded values at most from now on: none where no item is read twice."""
        self._cache.limit = nbytes
        if self._cache.nbytes > nbytes:
            self._cache.values.clear()
            self._cache.nbytes = 0

    def batches(self, size: int) -> Iterator[tuple[list[Item], Tensor]]:
        """Items and their values as `load` returns them, in order, `size` at a time; those of `part` alone, so that the
        batches of all parts together are those of the whole."""
        mine, parts = self.part
        starts = range(mine * size, len(self.items), parts * size)
        batches = self.stream(range(start, min(start + size, len(self.items))) for start in starts)
        return ((items, values) for items, values in batches if items)

    def stream(self, places: Iterable[Sequence[int]]) -> Iterator[tuple[list[Item], Tensor]]:
        """As `load` of the items at these places, list by list; the workers are some lists ahead."""
        ahead = self.workers and any(not self._known(item) for item in self.items)
        for items, decoded in self._ahead(places) if ahead else ((self._at(its), {}) for its in places):
            yield self._batch(items, decoded)

    def load(self, items: Sequence[Item]) -> tuple[list[Item], Tensor]:
        """The readable ones of `items` and their values, float32: images (n, channels, height, width) in [0, 1], or
        waveforms (n, channels, samples) in [-1, 1]."""
        return self._batch(items, {})

    def _at(self, places: Sequence[int]) -> list[Item]:
        return [self.items[place] for place in places]

    def _batch(self, items: Sequence[Item], decoded: dict[Item, Decoded]) -> tuple[list[Item], Tensor]:
        """decoded: those of the items that somebody has decoded already."""
        with self.watch.phase("load"):
            loaded = [(item, values) for item in items if (values := self._values(item, decoded)) is not None]
            if not loaded:
                return [], torch.empty(0)
            stacked = _stacked([values for _, values in loaded])
            return [item for item, _ in loaded], stacked.pin_memory() if self.pinned else stacked

    def _ahead(self, places: Iterable[Sequence[int]]) -> Iterator[tuple[list[Item], dict[Item, Decoded]]]:
        """Lists of items, and what the workers made of those that were not known yet."""
        from torch.utils.data import DataLoader

        drawn = deque[tuple[list[Item], list[int]]]()

        def wanted() -> Iterator[list[int]]:
            for its in places:
                items = self._at(its)
                unknown = [place for place, item in zip(its, items, strict=True) if not self._known(item)]
                drawn.append((items, unknown))
                yield unknown

        decoding: Any = _Decoding(self)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of more workers than cores, which somebody asked for
            loader: Any = DataLoader(
                decoding,
                batch_size=None,
                sampler=wanted(),
                num_workers=self.workers,
                collate_fn=list,  # as they are: otherwise each goes through shared memory, of which containers lack
                generator=torch.Generator(),  # it draws a seed for the workers: not from ours
                multiprocessing_context=_CONTEXT,
                worker_init_fn=_end_with_parent,
            )
            batches = iter(loader)
        while True:
            with self.watch.phase("load"):
                found = next(batches, None)
            if found is None:
                return
            items, unknown = drawn.popleft()
            yield items, dict(zip(self._at(unknown), found, strict=True))

    def _known(self, item: Item) -> bool:
        return item in self._cache.values or item.name in self.bad

    def _values(self, item: Item, decoded: dict[Item, Decoded]) -> Tensor | None:
        values = self._cache.values.get(item)
        if values is not None:
            return values
        if item.name in self.bad:
            return None
        found = decoded[item] if item in decoded else self.decode(item)
        if isinstance(found, Exception):
            self._leave_out(item, found)
            return None
        values = torch.tensor(found)
        first, shape = self._first = self._first or (item, tuple(values.shape))
        if tuple(values.shape) != shape:
            this, other = map(self.modality.written, (values.shape, shape))
            raise CodebookError(
                f"{self.modality.many} of unlike sizes: {item} is {this}, {first} is {other}; {self.modality.remedy}"
            )
        self._note(item, values)
        self._cache.add(item, values)
        return values

    def _note(self, item: Item, values: Tensor) -> None:
        full = self.modality.full
        if full is not None and (peak := float(values.abs().max())) > full:
            self.beyond[item.name] = Beyond(int((values.abs() > full).sum()), values.numel(), peak)

    def decode(self, item: Item) -> Decoded:
        """The item's values as the model takes them, uint8 or float32 as they were decoded, or why there are none."""
        try:
            stored = item.decode()
            values = self.modality.in_channels(stored, self.mixing)
            return self._refused(item, len(stored)) if values is None else self.modality.fitted(values)
        except Exception as error:  # decoders raise whatever they like on a damaged file
            return error

    def _refused(self, item: Item, channels: int) -> ChannelsError:
        return ChannelsError(
            f"{self.modality.one} {item} has {channels} channels, and the network takes {self.modality.channels}: give "
            f"--channels {'|'.join(MIXINGS)} ({self.modality.mixes})"
        )

    def _leave_out(self, item: Item, error: Exception) -> None:
        if isinstance(error, ChannelsError):
            raise error
        reason, one, many = one_line(error), self.modality.one, self.modality.many
        if not self.skip_bad:
            raise CodebookError(f"cannot read {one} {item}: {reason}; --skip-bad goes on without it") from error
        self.bad[item.name] = reason
        if len(self.bad) >= len(self.items) and all(item.name in self.bad for item in self.items):
            raise CodebookError(f"none of the {len(self)} {many} can be read, the last one {item}: {reason}") from error


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """float32 of values of one shape: what is uint8 counts 255ths, anything else is float32 already."""
    if all(one.dtype == torch.uint8 for one in values):
        return torch.stack([*values]).float().div_(255)
    return torch.stack([one.float().div_(255) if one.dtype == torch.uint8 else one for one in values])


_CONTEXT = "fork" if "fork" in torch.multiprocessing.get_all_start_methods() else None
"""How workers start: by a fork they have the items at once, where the others would copy every one."""


def _end_with_parent(worker: int) -> None:
    """A worker whose parent was killed would wait for ever. Linux alone can be asked to end it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


_SET_PARENT_DEATH_SIGNAL = 1  # of <linux/prctl.h>


class _Decoding:
    """What a worker does: lists of places in `media.items` to decoded items."""

    def __init__(self, media: Media) -> None:
        self._media = media

    def __getitem__(self, places: list[int]) -> list[Decoded]:
        found = [self._media.decode(self._media.items[place]) for place in places]
        # As text: an exception may hold what does not travel between processes.
        return [its if isinstance(its, ChannelsError) else _as_text(its) for its in found]


def _as_text(decoded: Decoded) -> Decoded:
    return ValueError(one_line(decoded)) if isinstance(decoded, Exception) else decoded
