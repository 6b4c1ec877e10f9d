"""A sample of many latents: those whose hashes are the smallest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codebook_tools.codebook import Latents
from codebook_tools.errors import CodebookError
from codebook_tools.runtime import distributed

SAMPLE_LIMIT = 1_000_000
"""Up to so many latents k-means sees all; beyond, a sample of so many."""


class Named(Protocol):
    """What latents belong to: an image or a clip. digest: SHA-256 of its name."""

    @property
    def digest(self) -> bytes: ...


Hashed = NDArray[np.uint64]
"""(n,) hashes of names, of what there is too much of to name each."""


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

    def columns(self) -> tuple[Tensor, ...]:
        """The sample, in the order of its hashes. Raises CodebookError where nothing was added."""
        keys, columns = self._smallest()
        if not len(keys):
            raise CodebookError("no latents: none of the items could be read")
        return columns

    def sample(self) -> Sample:
        """The sample with its hashes; of latents alone, and of nothing where that was added."""
        keys, (vectors,) = self._smallest()
        return Sample(torch.from_numpy(keys), vectors)

    def merge(self) -> None:
        """Take in what the other processes added: of the rows, only those are sent that are among the smallest."""
        keys, columns = self._smallest()
        everyones = np.sort(_gathered(keys))[: self._limit]
        mine = int(np.searchsorted(keys, everyones[-1], "right")) if len(everyones) else 0
        sent = _gathered(keys[:mine])
        order = np.argsort(sent, kind="stable")[: self._limit]
        rows = torch.from_numpy(order)
        self._kept = [(sent[order], tuple(distributed.gathered(column[:mine])[rows] for column in columns))]

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
    found: NDArray[np.uint64] = distributed.gathered(torch.from_numpy(keys.view(np.int64))).numpy().view(np.uint64)
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
    sampler, at = Sampler(seed, SAMPLE_LIMIT), distributed.rank() << 48  # each process has latents of its own
    for rows in latents:
        sampler.add(mixed(np.arange(at, at + len(rows), dtype=np.uint64)), 1, rows)
        at += len(rows)
    if distributed.count() > 1:
        sampler.merge()
    return sampler.columns()[0]
