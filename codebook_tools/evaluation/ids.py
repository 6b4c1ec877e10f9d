"""Ids: the tuples of codes over all quantizer stages, how many are distinct, and how many a surgery changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codebook_tools.data.sampling import Sampler, mixed
from codebook_tools.evaluation.one_pass import Accumulator, Batch
from codebook_tools.runtime import distributed

LIMIT = 1 << 25
"""Distinct ids that are counted exactly; more are estimated from as many, within 0.1 %."""

SAMPLE = 200_000
"""Ids that are compared before and after a surgery, at most."""

_PENDING = 1 << 17  # hashes that are collected before they are sorted into the distinct ones
_WORD = 63  # bits of codes that one step of the hash takes

Hashes = NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Distinct:
    """The ids of a pass. They add as sets, exactly and in any order.

    Attributes:
        items: Number of ids, repeats included.
        hashes: (n,) uint64, ascending: of the distinct ids, those below 2^64 / 2^halved.
        halved: How often the range of kept hashes was halved (adaptive sampling, Flajolet 1990); 0 where all are kept.
        sample: (n, stages) int32, a sample of the ids that agrees row by row with that of another pass over the same
            items; None where none was drawn. Sums have none.
    """

    items: int
    hashes: Hashes
    halved: int = 0
    sample: Tensor | None = None

    @staticmethod
    def none() -> Distinct:
        """No ids."""
        return Distinct(0, np.empty(0, np.uint64))

    @property
    def unique(self) -> int:
        """Number of distinct ids: exact up to LIMIT, an estimate beyond."""
        return min(self.items, len(self.hashes) << self.halved)

    def __add__(self, other: Distinct) -> Distinct:
        return self.with_hashes(other.items, other.hashes, other.halved)

    def with_hashes(self, items: int, hashes: Hashes, halved: int = 0) -> Distinct:
        """These and others: `items` ids of the given hashes, in any order and with repeats."""
        halved = max(self.halved, halved)
        kept = np.unique(_below(np.concatenate([self.hashes, hashes]), halved))
        while len(kept) > LIMIT:
            halved += 1
            kept = _below(kept, halved)
        return Distinct(self.items + items, kept, halved)


def _below(hashes: Hashes, halved: int) -> Hashes:
    return hashes if not halved else hashes[hashes >> np.uint64(64 - halved) == 0]


def tuples_of(codes: Sequence[Tensor]) -> Tensor:
    """The ids of a batch.

    Args:
        codes: (n, *grid) int64 of each quantizer stage, in the order of the stages.

    Returns:
        (n * positions, stages) int64: an id for each position, for each item where there is no grid. Where the grids of
        stages differ, so that no positions correspond: (n, all codes), an id for each item.
    """
    flat = [stage.reshape(len(stage), -1) for stage in codes]
    if len({stage.shape[1:] for stage in codes}) > 1:
        return torch.cat(flat, 1).cpu()
    return torch.stack(flat, -1).flatten(0, 1).cpu()


def hashed(ids: Tensor, size: int) -> Hashes:
    """Hashes of ids.

    Ids that fit in 63 bits have distinct hashes. Of longer ones, 20 million have two alike with probability 1e-5.

    Args:
        ids: (n, stages) int64.
        size: Codes of the largest codebook.

    Returns:
        (n,) uint64.
    """
    bits = max(1, (size - 1).bit_length())
    at_once = max(1, _WORD // bits)
    hashes = np.zeros(len(ids), np.uint64)
    columns = ids.numpy().astype(np.uint64)
    for start in range(0, columns.shape[1], at_once):
        word = np.zeros(len(ids), np.uint64)
        for column in columns[:, start : start + at_once].T:
            word = (word << np.uint64(bits)) | column
        hashes = mixed(hashes ^ word)
    return hashes


class Ids(Accumulator):
    """The ids of a pass, and a sample of them.

    Attributes:
        distinct: The ids so far, without those that are still collected.
    """

    def __init__(self, size: int, stages: int, seed: int | None) -> None:
        """
        Args:
            size: Codes of the largest codebook.
            stages: Number of quantizer stages.
            seed: Of the sample; None for no sample.
        """
        self._size, self._stages = size, stages
        self._sampler = None if seed is None else Sampler(seed, SAMPLE)
        if self._sampler:
            self._sampler.add([], 0, torch.empty(0, stages, dtype=torch.int32))
        self._pending, self._count, self._items = list[Hashes](), 0, 0
        self.distinct = Distinct.none()

    def add(self, batch: Batch) -> None:
        """Add the ids of a batch."""
        ids = tuples_of(batch.stages)
        self._pending.append(hashed(ids, self._size))
        self._count += len(ids)
        if (
            self._sampler and ids.shape[1] == self._stages and len(batch.items)
        ):  # else ids are of items, and of any length
            self._sampler.add(batch.items, len(ids) // len(batch.items), ids.int())
        if self._count >= max(_PENDING, len(self.distinct.hashes) // 2):  # so that n ids cost O(n log n)
            self._collect()

    def _collect(self) -> None:
        if self._pending:
            self.distinct = self.distinct.with_hashes(self._count, np.concatenate(self._pending))
        self._pending, self._count = [], 0

    def merge(self) -> None:
        """Add the ids of all processes."""
        self._collect()
        own = self.distinct
        halved = max(distributed.each(own.halved))
        hashes = distributed.gathered(torch.from_numpy(_below(own.hashes, halved).view(np.int64))).numpy()
        items = sum(distributed.each(own.items))
        self.distinct = Distinct.none().with_hashes(items, hashes.view(np.uint64), halved)
        if self._sampler:
            self._sampler.merge()

    def done(self) -> Distinct:
        """All ids, with their sample if there is one."""
        self._collect()
        return replace(self.distinct, sample=self._sampler.sample().vectors if self._sampler else None)


def share_changed(before: Tensor, after: Tensor, nearest: Sequence[Tensor]) -> float | None:
    """The share of ids that are not what the nearest maps make of the old ids.

    Args:
        before: (n, stages), ids of some items before a surgery.
        after: (n, stages), ids of the same items after it.
        nearest: Of each stage (old size,) int64, the new code of each old one.

    Returns:
        The share; None where the two are not of the same items, or of none.
    """
    if before.shape != after.shape or not len(before):
        return None
    moved = torch.stack([of[codes.long()] for of, codes in zip(nearest, before.T, strict=True)], 1)
    return float((moved != after).any(1).double().mean())
