"""Which latents lie nearest to each code, and which farthest from it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import squared_errors
from codebook_tools.codebook import Codebook
from codebook_tools.data.items import Item
from codebook_tools.evaluation.one_pass import Accumulator, Batch
from codebook_tools.evaluation.receptive_field import Place

_End = tuple[Tensor, Tensor, Tensor]
"""Code, score and place in the stream of latents, (n,) each."""


class ExtremeLatents(Accumulator):
    """Of each code, the latents nearest to it and farthest from it.

    Attributes:
        counts: (size,) int64, latents assigned to each code.
        errors: (size,) float64, the sum of their squared distances.
        grid: Lengths of the axes of the grid of an item's latents.
        items: That were read, in order.
    """

    def __init__(self, codebook: Codebook, most: int, grid: tuple[int, ...]) -> None:
        """Start without a latent. most: latents of each kind for a code."""
        self.codebook, self.most, self.grid, self.items = codebook, most, grid, list[Item]()
        self._starts = [0]  # where the latents of each item start in the stream, and where those of the next will
        self.counts = torch.zeros(codebook.size, dtype=torch.int64)
        self.errors = torch.zeros(codebook.size, dtype=torch.float64)
        self._ends = dict.fromkeys((1, -1), (torch.empty(0).long(), torch.empty(0).double(), torch.empty(0).long()))

    def add(self, batch: Batch) -> None:
        """Assign the latents of a batch."""
        codes = batch.codes[0].cpu()
        errors = squared_errors(batch.latents[0], self.codebook, batch.codes[0]).cpu()
        self.counts += torch.bincount(codes, minlength=len(self.counts))
        self.errors.index_add_(0, codes, errors)
        at = torch.arange(len(codes)) + self._starts[-1]
        for sign, kept in self._ends.items():
            self._ends[sign] = self._lowest(kept, (codes, sign * errors, at))
        items = cast("Sequence[Item]", batch.items)
        each = len(codes) // len(items)
        self._starts += [self._starts[-1] + each * (i + 1) for i in range(len(items))]
        self.items += items

    def _lowest(self, kept: _End, more: _End) -> _End:
        codes, scores, at = map(torch.cat, zip(kept, more, strict=True))
        lowest = lowest_of_each(codes, scores, self.most)
        return codes[lowest], scores[lowest], at[lowest]

    @property
    def used(self) -> Tensor:
        """(size,) bool: codes with at least one latent."""
        return self.counts > 0

    @property
    def error(self) -> Tensor:
        """(size,) float64: the mean squared distance of a code's latents, 0 of a dead one."""
        return self.errors / self.counts.clamp(min=1)

    @property
    def nearest(self) -> dict[int, list[Place]]:
        """The places of the nearest latents of each code in use, the nearest first."""
        return self._places(1)

    @property
    def farthest(self) -> dict[int, list[Place]]:
        """The places of the farthest latents of each code in use, the farthest first."""
        return self._places(-1)

    def _places(self, sign: int) -> dict[int, list[Place]]:
        places = dict[int, list[Place]]()
        columns = self.grid[1] if len(self.grid) == 2 else None
        codes, _, positions = self._ends[sign]
        for code, at in zip(codes.tolist(), positions.tolist(), strict=True):
            item = bisect_right(self._starts, at) - 1
            start, end = self._starts[item : item + 2]
            row, column = divmod(at - start, columns or end - start)
            places.setdefault(code, []).append(Place(self.items[item], row, column, end - start))
        return places


def lowest_of_each(codes: Tensor, scores: Tensor, most: int) -> Tensor:
    """The `most` lowest scores of each code.

    Args:
        codes: (n,) int64.
        scores: (n,) float64.
        most: Scores of a code, at most.

    Returns:
        (m,) int64, their indices by code and rising score; the first among equals.
    """
    order = scores.argsort(stable=True)
    order = order[codes[order].argsort(stable=True)]
    ordered = codes[order]
    rank = torch.arange(len(order)) - torch.searchsorted(ordered, ordered)
    return order[rank < most]
