"""Latents: streams that can be read twice, and the one pass that counts, measures and samples them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codebook_tools import processes
from codebook_tools.assignment import nearest, squared_errors
from codebook_tools.codebook import Codebook, Latents
from codebook_tools.errors import CodebookError
from codebook_tools.items import Item
from codebook_tools.media import Media
from codebook_tools.watch import Watch

_AT_ONCE = 65_536  # latents whose codes are looked up together

SAMPLE_LIMIT = 1_000_000
"""Up to so many latents k-means sees all; beyond, a sample of so many."""


@dataclass(frozen=True, eq=False)
class StoredLatents:
    """Latents that fit in memory. vectors: (n, dim) float32. batch: rows a batch."""

    vectors: Tensor
    batch: int = 65_536

    def __len__(self) -> int:
        return len(self.vectors)

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.split(self.vectors, self.batch)


class Named(Protocol):
    """What latents belong to: an image or a clip. digest: SHA-256 of its name."""

    @property
    def digest(self) -> bytes: ...


Hashed = NDArray[np.uint64]
"""(n,) hashes of names, of what there is too much of to name each."""


Batch = tuple[Sequence[Named] | Hashed, Tensor]
"""What latents belong to, and they: (n, positions, dim) float32."""


class ItemLatents(Protocol):
    """Latents that are known by the items they belong to, how many of which there are. part: which of how many parts of
    them `by_item` gives; as Media.part."""

    @property
    def part(self) -> tuple[int, int]: ...

    def __len__(self) -> int: ...

    def by_item(self) -> Iterator[tuple[Sequence[Named] | Hashed, Tensor]]: ...


@dataclass(frozen=True, eq=False)
class EncodedLatents:
    """Latents of images, encoded anew at each reading.

    encode: images (n, channels, height, width) in [0, 1] -> (n, positions, dim) float32.
    """

    images: Media
    encode: Callable[[Tensor], Tensor]
    batch: int = 64

    def __iter__(self) -> Iterator[Tensor]:
        for _, latents in self.by_item():
            yield latents.flatten(0, 1)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def part(self) -> tuple[int, int]:
        return self.images.part

    def by_item(self) -> Iterator[tuple[list[Item], Tensor]]:
        """Items and their latents, (n, positions, dim). Raises CodebookError at the first that is not finite."""
        for items, pixels in self.images.batches(self.batch):
            latents = self.encode(pixels)
            if not all_finite(latents):
                finite = torch.isfinite(latents).flatten(1).all(1)
                raise CodebookError(f"the encoder's latents of {items[int(finite.int().argmin())].name} are not finite")
            yield items, latents


def all_finite(values: Tensor) -> bool:
    """Of one value at least. In one pass without a mask: it is asked of every batch."""
    low, high = torch.aminmax(values)  # which hand on a NaN
    return bool(low.isfinite() & high.isfinite())


def mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea and Flood 2014): a bijection of 64-bit words that looks random."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample_keys(items: Sequence[Named] | Hashed, positions: int, seed: int) -> NDArray[np.uint64]:
    """(len(items) * positions,) hashes of seed, item name and position: a latent's place in the sampling order."""
    if not isinstance(items, np.ndarray):
        items = np.array([int.from_bytes(item.digest[24:], "big") for item in items], dtype=np.uint64)
    salted = mixed(items ^ mixed(np.array([seed % 2**64], dtype=np.uint64)))
    return mixed(salted[:, None] + np.arange(positions, dtype=np.uint64)[None, :]).ravel()


@dataclass(frozen=True, eq=False)
class Survey:
    """What one pass over the calibration latents found.

    counts: (size,) int64. total: latents seen. sample: (n, dim) float32, ordered by hash, so that every head of it is a
    uniform sample; all latents when total <= SAMPLE_LIMIT. codes: (n,) int64, of the sample. error: sum of squared
    errors, over all latents.
    """

    counts: Tensor
    total: int
    sample: StoredLatents
    codes: Tensor
    error: float

    @property
    def sampled(self) -> bool:
        return len(self.sample) < self.total


@dataclass(frozen=True, eq=False)
class Sample:
    """Latents whose hashes are the smallest. hashes: (n,) uint64, ascending. vectors: (n, dim) float32."""

    hashes: Tensor
    vectors: Tensor


class Sampler:
    """Rows of many latents, the `limit` whose hashes are the smallest: which they are does not depend on order or
    batching, only on names and seed, so that two passes over one data set line up row by row."""

    def __init__(self, seed: int, limit: int) -> None:
        self._seed, self._limit = seed, limit
        self._kept: list[tuple[NDArray[np.uint64], tuple[Tensor, ...]]] = []
        self._held, self._ceiling = 0, np.uint64(2**64 - 1)

    def add(self, items: Sequence[Named] | Hashed, positions: int, *columns: Tensor) -> None:
        """columns: (len(items) * positions, ...) each, of the items' latents in order."""
        self.add_hashed(sample_keys(items, positions, self._seed), *columns)

    def add_hashed(self, keys: NDArray[np.uint64], *columns: Tensor) -> None:
        """keys: (n,), the hashes of latents. columns: (n, ...) each."""
        chosen = np.flatnonzero(keys <= self._ceiling)
        if len(chosen) == len(keys):
            self._kept.append((keys, tuple(column.cpu() for column in columns)))
        else:
            rows = torch.from_numpy(chosen)
            self._kept.append((keys[chosen], tuple(column.cpu()[rows] for column in columns)))
        self._held += len(chosen)
        if self._held > self._limit + max(self._limit // 4, 65_536):  # rarely, so that n latents cost O(n)
            self._kept = [self._smallest()]
            self._held, self._ceiling = self._limit, self._kept[0][0].max()

    def columns(self, parts: int = 1) -> tuple[Tensor, ...]:
        """The sample, in the order of its hashes: of what all processes added, where there are several parts. Raises
        CodebookError where nothing was added."""
        keys, columns = self._of_all() if parts > 1 else self._smallest()
        if not len(keys):
            raise CodebookError("no latents: none of the items could be read")
        return columns

    def sample(self, parts: int = 1) -> Sample:
        """The sample with its hashes; of latents alone, and of nothing where that was added."""
        keys, (vectors,) = self._of_all() if parts > 1 else self._smallest()
        return Sample(torch.from_numpy(keys), vectors)

    def _of_all(self) -> tuple[NDArray[np.uint64], tuple[Tensor, ...]]:
        """The smallest of all processes: of the rows, only those are sent that are among them."""
        keys, columns = self._smallest()
        everyones = np.sort(_gathered(keys))[: self._limit]
        mine = int(np.searchsorted(keys, everyones[-1], "right")) if len(everyones) else 0
        sent = _gathered(keys[:mine])
        order = np.argsort(sent, kind="stable")[: self._limit]
        rows = torch.from_numpy(order)
        return sent[order], tuple(processes.gathered(column[:mine])[rows] for column in columns)

    def _smallest(self) -> tuple[NDArray[np.uint64], tuple[Tensor, ...]]:
        keys = np.concatenate([keys for keys, _ in self._kept])
        order = np.argsort(keys)[: self._limit]
        places = np.full(len(keys), -1)
        places[order] = np.arange(len(order))
        parts = np.split(places, np.cumsum([len(keys) for keys, _ in self._kept])[:-1])
        columns = zip(*(columns for _, columns in self._kept), strict=True)
        return keys[order], tuple(_placed(column, parts, len(order)) for column in columns)


def _placed(column: Sequence[Tensor], places: Sequence[NDArray[np.int64]], count: int) -> Tensor:
    """(count, ...): each row of the column's parts in its place; those without one, below 0, are left out."""
    found = column[0].new_empty((count, *column[0].shape[1:]))
    for rows, its in zip(column, places, strict=True):
        kept = its >= 0
        found[torch.from_numpy(its[kept])] = rows if kept.all() else rows[torch.from_numpy(kept)]
    return found


def _gathered(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """All processes' keys, one after another."""
    found: NDArray[np.uint64] = processes.gathered(torch.from_numpy(keys.view(np.int64))).numpy().view(np.uint64)
    return found


def smallest(samples: Iterable[Sample], limit: int) -> Sample:
    """The sample of all that samples were drawn from, each by the same seed and of `limit` or all."""
    sampler = Sampler(0, limit)
    for sample in samples:
        sampler.add_hashed(sample.hashes.numpy(), sample.vectors)
    return sampler.sample()


def drawn_rows(latents: Latents, seed: int) -> Tensor:
    """(n, dim) float32: SAMPLE_LIMIT of the latents or all, by their place in the stream, in an order whose heads are
    uniform samples."""
    sampler, at = Sampler(seed, SAMPLE_LIMIT), processes.rank() << 48  # each process has latents of its own
    for rows in latents:
        sampler.add(mixed(np.arange(at, at + len(rows), dtype=np.uint64)), 1, rows)
        at += len(rows)
    return sampler.columns(processes.count())[0]


def survey(latents: ItemLatents, codebook: Codebook, *, seed: int, limit: int = SAMPLE_LIMIT, watch: Watch) -> Survey:
    """Encode, count and sample in one pass; of parts, what all processes found together."""
    counts = torch.zeros(codebook.size, dtype=torch.int64)
    error, parts = torch.zeros((), dtype=torch.float64), latents.part[1]
    sampler = Sampler(seed, limit)
    sampler.add([], 0, torch.empty(0, codebook.dim), torch.empty(0, dtype=torch.int64))  # a part may have no batch

    def told() -> Iterator[Batch]:
        done = 0
        for items, batch in latents.by_item():
            done += len(items) * parts
            watch.progress("encode", min(done, len(latents)), len(latents))
            yield items, batch

    for held in _grouped(told()):
        batches = [batch.flatten(0, 1) for _, batch in held]
        codes = nearest(torch.cat(batches), codebook)
        counts += torch.bincount(codes, minlength=codebook.size).cpu()
        for (items, batch), rows, its in zip(held, batches, torch.split(codes, [*map(len, batches)]), strict=True):
            error += squared_errors(rows, codebook, its).double().sum().cpu()
            sampler.add(items, batch.shape[1], rows, its)
    if parts > 1:
        counts, error = processes.summed(counts), processes.summed(error)
    rows, codes = sampler.columns(parts)
    return Survey(counts, int(counts.sum()), StoredLatents(rows), codes, float(error))


def _grouped(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Several at a time: finding the nearest codes of a few latents takes longer to begin than to do."""
    held, rows = list[Batch](), 0
    for items, latents in batches:
        held.append((items, latents))
        rows += latents.shape[0] * latents.shape[1]
        if rows >= _AT_ONCE:
            yield held
            held, rows = [], 0
    if held:
        yield held


def joined(latents: Latents) -> Tensor:
    """(n, dim) float32: all of them."""
    return latents.vectors if isinstance(latents, StoredLatents) else torch.cat(list(latents))
