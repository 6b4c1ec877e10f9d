"""Uniform samples of latents: those with the smallest hashes, whatever the order of reading."""

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
"""Latents in a sample at most, which k-means sees; fewer latents are kept whole."""


class Named(Protocol):
    """An image or a clip that latents belong to."""

    @property
    def digest(self) -> bytes:
        """SHA-256 of its name."""
        ...


_PIECES = 1024
"""Pieces of a sample at most, before they are made one."""

Hashed = NDArray[np.uint64]
"""(n,) hashes in place of names, for rows of files, which are too many to be named."""


def mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finalizer of splitmix64, a pseudorandom bijection of 64-bit words, (n,) to (n,).

    Source: Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample_keys(items: Sequence[Named] | Hashed, positions: int, seed: int) -> NDArray[np.uint64]:
    """Hashes of seed, item name and position, by which latents are ordered.

    Args:
        items: Items, their hashes (n,), or a sequence of items with these as `hashes`.
        positions: Latents per item.
        seed: Any integer, taken modulo 2**64.

    Returns:
        (n * positions,) uint64, item by item.
    """
    items = getattr(items, "hashes", items)
    if not isinstance(items, np.ndarray):
        items = np.array([int.from_bytes(item.digest[24:], "big") for item in items], dtype=np.uint64)
    salted = mixed(items ^ mixed(np.array([seed % 2**64], dtype=np.uint64)))
    return mixed(salted[:, None] + np.arange(positions, dtype=np.uint64)[None, :]).ravel()


@dataclass(frozen=True, eq=False)
class Sample:
    """The latents with the smallest hashes.

    Attributes:
        hashes: (n,) uint64, ascending.
        vectors: (n, dim) float32.
    """

    hashes: Tensor
    vectors: Tensor


class Sampler:
    """Keeps the `limit` latents with the smallest hashes.

    Which they are depends on names and seed only, not on order or batching, so that two passes over one data set give
    samples that agree row by row.
    """

    def __init__(self, seed: int, limit: int) -> None:
        """seed: of `sample_keys`. limit: how many latents are kept at most."""
        self._seed, self._limit = seed, limit
        self._kept: list[tuple[NDArray[np.uint64], tuple[Tensor, ...]]] = []
        self._count, self._ceiling = 0, np.uint64(2**64 - 1)

    def add(self, items: Sequence[Named] | Hashed, positions: int, *columns: Tensor) -> None:
        """Add the latents of some items.

        Args:
            items: Items, or their hashes (n,).
            positions: Latents per item.
            *columns: What is kept of each latent, (n * positions, ...) each, item by item.
        """
        self.add_hashed(sample_keys(items, positions, self._seed), *columns)

    def add_hashed(self, keys: NDArray[np.uint64], *columns: Tensor) -> None:
        """Add latents by their own hashes, (n,); columns: (n, ...) each."""
        chosen = np.flatnonzero(keys <= self._ceiling)
        if len(chosen) == len(keys):
            self._kept.append((keys, tuple(column.cpu() for column in columns)))
        else:
            rows = torch.from_numpy(chosen)
            self._kept.append((keys[chosen], tuple(column.cpu()[rows] for column in columns)))
        self._count += len(chosen)
        full = self._count > self._limit + max(self._limit // 4, 65_536)  # rarely, so that n latents cost O(n)
        if full or (len(self._kept) > _PIECES and self._count > self._limit):  # or small pieces would add up
            self._kept = [self._smallest()]
            self._count, self._ceiling = self._limit, self._kept[0][0].max()

    def columns(self) -> tuple[Tensor, ...]:
        """The columns of the sample, in ascending order of hashes.

        Raises:
            CodebookError: No latent was added.
        """
        keys, columns = self._smallest()
        if not len(keys):
            raise CodebookError("no latents: none of the items could be read")
        return columns

    def sample(self) -> Sample:
        """The sample with its hashes, where latents are the only column; it may be empty."""
        keys, (vectors,) = self._smallest()
        return Sample(torch.from_numpy(keys), vectors)

    def merge(self) -> None:
        """Take in what the other processes added; only rows among the smallest of all are sent."""
        keys, columns = self._smallest()
        smallest_keys = np.sort(_gathered(keys))[: self._limit]
        count = int(np.searchsorted(keys, smallest_keys[-1], "right")) if len(smallest_keys) else 0
        sent = _gathered(keys[:count])
        order = np.argsort(sent, kind="stable")[: self._limit]
        rows = torch.from_numpy(order)
        self._kept = [(sent[order], tuple(distributed.gathered(column[:count])[rows] for column in columns))]

    def _smallest(self) -> tuple[NDArray[np.uint64], tuple[Tensor, ...]]:
        keys = np.concatenate([keys for keys, _ in self._kept])
        order = np.argsort(keys)[: self._limit]
        places = np.full(len(keys), -1)
        places[order] = np.arange(len(order))
        parts = np.split(places, np.cumsum([len(keys) for keys, _ in self._kept])[:-1])
        columns = zip(*(columns for _, columns in self._kept), strict=True)
        return keys[order], tuple(_placed(column, parts, len(order)) for column in columns)


def _placed(column: Sequence[Tensor], places: Sequence[NDArray[np.int64]], count: int) -> Tensor:
    """(count, ...): rows of a column's parts at their places; rows with a place below 0 are left out."""
    placed = column[0].new_empty((count, *column[0].shape[1:]))
    for rows, targets in zip(column, places, strict=True):
        kept = targets >= 0
        placed[torch.from_numpy(targets[kept])] = rows if kept.all() else rows[torch.from_numpy(kept)]
    return placed


def _gathered(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The keys of all processes, in order of rank."""
    signed: NDArray[np.int64] = distributed.gathered(torch.from_numpy(keys.view(np.int64))).numpy()
    return signed.view(np.uint64)


def smallest(samples: Iterable[Sample], limit: int) -> Sample:
    """Merge samples of parts of the data into the sample of the whole.

    Args:
        samples: Drawn by one seed, of `limit` latents each, or all of a part.
        limit: Latents of the result at most.
    """
    sampler = Sampler(0, limit)
    for sample in samples:
        sampler.add_hashed(sample.hashes.numpy(), sample.vectors)
    return sampler.sample()


def drawn_rows(latents: Latents, seed: int) -> Tensor:
    """Sample a stream of latents by their positions in it.

    Returns:
        (n, dim) float32: SAMPLE_LIMIT latents or all, in an order of which every head is a uniform sample.
    """
    sampler, start = Sampler(seed, SAMPLE_LIMIT), distributed.rank() << 48  # each process has its own latents
    for rows in latents:
        sampler.add(mixed(np.arange(start, start + len(rows), dtype=np.uint64)), 1, rows)
        start += len(rows)
    if distributed.count() > 1:
        sampler.merge()
    return sampler.columns()[0]
