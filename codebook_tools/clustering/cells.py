"""Sums of the points of each cell of k-means, over threads and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import nearest, squared_errors
from codebook_tools.clustering.balanced import Emphasis
from codebook_tools.codebook import Codebook, Metric
from codebook_tools.runtime import distributed
from codebook_tools.runtime.devices import wide, wide_device
from codebook_tools.runtime.threads import spread

Slab = tuple[Tensor, Tensor | None]
"""Points (n, dim) and their weights (n,)."""

_WIDENED, _ELSEWHERE = {"cpu": 2048}, 1 << 18  # points that are float64 at a time: in the cache of a core


@dataclass(frozen=True, eq=False)
class Cells:
    """Sums over the points of each cell, on the device of the points, or on the CPU where that has no float64.

    Attributes:
        sums: (k, dim) float64, sum of the emitted points of each cell.
        hits: (k,) float64, points of each cell, or the sum of their weights.
        squares: float64, sum of the squared lengths of all points, each times its weight.
    """

    sums: Tensor
    hits: Tensor
    squares: Tensor

    @staticmethod
    def of(slab: Slab, codebook: Codebook, emphasis: Emphasis | None = None, codes: Tensor | None = None) -> Cells:
        """The cells of points (n, dim) float32, with their weights (n,) float64 or None.

        Args:
            slab: Points and weights.
            codebook: The codes of the cells.
            emphasis: By which weights are multiplied, for their distances.
            codes: (n,) int64, of the points; None for the nearest.
        """
        points, weights = slab
        codes = nearest_codes(points, codebook) if codes is None else codes
        if emphasis is not None:
            of_distance = emphasis.weights(squared_errors(points, codebook, codes))
            weights = of_distance if weights is None else weights * of_distance
        sums = torch.zeros(codebook.size, codebook.dim, dtype=torch.float64, device=wide_device(points.device))
        codes, squares = codes.to(sums.device), sums.new_zeros(())
        for at, rows, weighted in _widened(codebook.metric.emit(points), weights):
            sums.index_add_(0, codes[at], weighted)
            squares += torch.dot(rows.flatten(), weighted.flatten())
        return Cells(sums, torch.bincount(codes, weights, minlength=codebook.size).double(), squares)

    @staticmethod
    def over(slabs: Iterable[Slab], codebook: Codebook, emphasis: Emphasis | None = None) -> Cells:
        """The cells of the points (n, dim) of all slabs, with their weights, by their nearest codes."""
        work = partial(Cells.of, codebook=codebook, emphasis=emphasis)
        return Cells.added(spread(work, slabs) if codebook.vectors.is_cpu else map(work, slabs), codebook)

    @staticmethod
    def added(parts: Iterable[Cells], codebook: Codebook) -> Cells:
        """The cells of the points of all parts, which may be none."""
        vectors = codebook.vectors
        sums = torch.zeros(vectors.shape, dtype=torch.float64, device=wide_device(vectors.device))
        total = Cells(sums, sums.new_zeros(codebook.size), sums.new_zeros(()))
        for cells in parts:
            total.sums.add_(cells.sums)
            total.hits.add_(cells.hits)
            total.squares.add_(cells.squares)
        return total

    def move(self, slab: Slab, metric: Metric, before: Tensor, now: Tensor) -> Cells:
        """These cells, in place, after points of theirs went to other codes.

        Args:
            slab: All points (n, dim) and their weights.
            metric: How points are emitted.
            before: (n,) int64, the codes that these cells are of.
            now: (n,) int64, the new codes.
        """
        points, weights = slab
        gone = (before != now).nonzero()[:, 0]
        moved = None if weights is None else weights[gone]
        source, target = before[gone].to(self.sums.device), now[gone].to(self.sums.device)
        for at, _, weighted in _widened(metric.emit(points[gone]), moved):
            self.sums.index_add_(0, target[at], weighted)
            self.sums.index_add_(0, source[at], weighted, alpha=-1)
        hits = torch.bincount(now.to(self.sums.device), weights, minlength=len(self.hits))
        return replace(self, hits=hits.double())  # counted anew: what rounding leaves of a sum is no point

    def of_all(self) -> Cells:
        """Summed over processes."""
        total = distributed.summed(torch.cat([self.sums.flatten(), self.hits, self.squares[None]]))
        parts = torch.split(total, [self.sums.numel(), len(self.hits), 1])
        return Cells(parts[0].reshape(self.sums.shape), parts[1], parts[2][0])

    def means(self, old: Codebook) -> Tensor:
        """(k, dim) float32, the emitted mean of each cell; the old code where a cell has none."""
        means = old.metric.emit(
            (self.sums / self.hits.masked_fill(self.empty, 1)[:, None]).float().to(old.vectors.device)
        )
        lost = (means == 0).all(1) if old.metric.has_unit_rows else self.empty  # directions may cancel out
        return torch.where(lost.to(means.device)[:, None], old.emitted, means)

    @property
    def empty(self) -> Tensor:
        """(k,) bool: cells without points."""
        return self.hits == 0

    def inertia(self, vectors: Tensor) -> float:
        """Sum of squared distances of all points to the vectors (k, dim) of their cells."""
        codes = wide(vectors)
        inertia = self.squares - 2 * (codes * self.sums).sum() + (self.hits * codes.square().sum(1)).sum()
        return max(0.0, float(inertia))


def _widened(emitted: Tensor, weights: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Parts of rows (n, dim): their place, the rows in float64, and those times their weights (n,)."""
    at_once = _WIDENED.get(emitted.device.type, _ELSEWHERE)
    for start in range(0, len(emitted), at_once):
        at = slice(start, start + at_once)
        rows = wide(emitted[at])
        yield at, rows, rows if weights is None else rows * weights[at, None]


def nearest_codes(points: Tensor, codebook: Codebook) -> Tensor:
    """Nearest codes; on a GPU by flash-kmeans where installed, which stores no scores and does not settle near-ties."""
    flash = _flash_kmeans() if points.is_cuda and codebook.metric.is_euclidean else None
    if flash is None:
        return nearest(points, codebook)
    codes: Tensor = flash(points[None], codebook.vectors[None], points.square().sum(1)[None])
    return codes[0].long()


@cache
def _flash_kmeans() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """The kernel: points (1, n, dim), codes (1, k, dim) and the points' squared lengths (1, n) -> codes (1, n)."""
    if find_spec("flash_kmeans") is None:
        return None
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    kernel: Callable[[Tensor, Tensor, Tensor], Tensor] = euclid_assign_triton
    return kernel
