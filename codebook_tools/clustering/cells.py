"""One pass of k-means over its points: sums of the points of each cell, over threads and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import nearest, squared_errors
from codebook_tools.clustering.balanced import Emphasis
from codebook_tools.codebook import Codebook
from codebook_tools.runtime import distributed
from codebook_tools.runtime.devices import wide, wide_device
from codebook_tools.runtime.threads import spread

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
    def of(slab: tuple[Tensor, Tensor | None], codebook: Codebook, emphasis: Emphasis | None = None) -> Cells:
        """The cells of points (n, dim) float32, with their weights (n,) float64 or None.

        Args:
            slab: Points and weights.
            codebook: The codes of the cells.
            emphasis: By which weights are multiplied, for their distances.
        """
        points, weights = slab
        codes = _nearest(points, codebook)
        if emphasis is not None:
            of_distance = emphasis.weights(squared_errors(points, codebook, codes))
            weights = of_distance if weights is None else weights * of_distance
        emitted = codebook.metric.emit(points)
        device = wide_device(points.device)
        sums = torch.zeros(codebook.size, codebook.dim, dtype=torch.float64, device=device)
        codes, squares = codes.to(device), sums.new_zeros(())
        at_once = _WIDENED.get(points.device.type, _ELSEWHERE)
        for start in range(0, len(points), at_once):
            at = slice(start, start + at_once)
            rows = wide(emitted[at])
            weighted = rows if weights is None else rows * weights[at, None]
            sums.index_add_(0, codes[at], weighted)
            squares += torch.dot(rows.flatten(), weighted.flatten())
        return Cells(sums, torch.bincount(codes, weights, minlength=codebook.size).double(), squares)

    @staticmethod
    def over(
        slabs: Iterable[tuple[Tensor, Tensor | None]], codebook: Codebook, emphasis: Emphasis | None = None
    ) -> Cells:
        """The cells of the points (n, dim) of all slabs, with their weights, summed over processes."""
        vectors = codebook.vectors
        sums = torch.zeros(vectors.shape, dtype=torch.float64, device=wide_device(vectors.device))
        hits, squares = sums.new_zeros(codebook.size), sums.new_zeros(1)
        work = partial(Cells.of, codebook=codebook, emphasis=emphasis)
        for cells in spread(work, slabs) if vectors.is_cpu else map(work, slabs):
            sums += cells.sums
            hits += cells.hits
            squares += cells.squares
        total = distributed.summed(torch.cat([sums.flatten(), hits, squares]))
        parts = torch.split(total, [sums.numel(), len(hits), 1])
        return Cells(parts[0].reshape(sums.shape), parts[1], parts[2])

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


def _nearest(points: Tensor, codebook: Codebook) -> Tensor:
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
