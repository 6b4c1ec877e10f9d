"""Passes of k-means over its points: among all codes, or among the neighbors of each point's last code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from codebook_tools.clustering.balanced import Emphasis
from codebook_tools.clustering.cells import Cells, Slab, nearest_codes
from codebook_tools.clustering.neighbors import Neighbors, centered
from codebook_tools.codebook import Codebook
from codebook_tools.runtime import distributed
from codebook_tools.runtime.threads import spread

_SLAB, _ELSEWHERE = {"cpu": 65_536}, 1 << 20  # points at most that one thread, or a GPU, assigns and sums at a time
_SLABS = 16  # at least, so that all threads have work; not the number of threads, or results would depend on it
_LEAST = 4096  # points of a slab at least: fewer are not worth the overhead
_NEARBY_FROM, _FUSED_FROM = 256, 8192  # codes from which on a search among neighbors is faster: see `nearby_from`
_FUSED = 16  # dimensions up to which faiss has a search that stores no scores, several times as fast as a product
_NEIGHBORS = 32  # of a code at first: the nearest code after an iteration is nearly always among them;
_MISSED = 0.02  # where it was not for more of the points, twice as many are listed from then on,
_MOST_ONE_IN = 8  # but no more of all codes
_FIRST_LISTS = 2  # passes that lists of neighbors serve at first; twice as many each time, for codes settle


@dataclass(frozen=True, eq=False)
class Streamed:
    """Passes over slabs that are read anew each time; each point gets the nearest of all codes.

    Attributes:
        slabs: A new iterator over this process's slabs.
        is_local: As of InMemory: never.
        codes: As of InMemory: not kept.
        neighbors: As of InMemory: not listed.
    """

    slabs: Callable[[], Iterable[Slab]]

    is_local = False
    codes = neighbors = None

    def cells(self, codebook: Codebook, emphasis: Emphasis | None, everywhere: bool) -> Cells:
        """The cells of all processes."""
        return Cells.over(self.slabs(), codebook, emphasis).of_all()

    def place(self, points: Tensor, codes: Tensor) -> None:
        """Codes (m,) are at these points (m,) now."""


class InMemory:
    """Passes over points in memory, of which each process has all, and works on its part.

    Where a search among all codes would take long, a point stays, or goes to a neighbor of its code. The inertia falls
    as that of Lloyd's does. Source: Agustsson, Timofte and Van Gool 2017, "k²-means for fast and accurate large scale
    clustering".

    Attributes:
        is_local: Whether most passes search among neighbors alone.
    """

    def __init__(self, points: Tensor, weights: Tensor | None, k: int) -> None:
        self._own = own = distributed.own_slice(len(points))
        self._slab = points[own], None if weights is None else weights[own]
        self.is_local = k >= nearby_from(points.shape[1])
        self._all, self._count = len(points), _NEIGHBORS
        self._codes: Tensor | None = None
        self._cells: Cells | None = None
        self._neighbors: Neighbors | None = None
        self._passes, self._lasts = 0, 0  # left for these lists, and of the lists when they were new

    @property
    def codes(self) -> Tensor | None:
        """(n,) int64, of the points of all processes; None before the first pass."""
        return None if self._codes is None else distributed.gathered(self._codes)

    @property
    def neighbors(self) -> Tensor | None:
        """(k, m) int64: codes near each code, as last listed; None where none were."""
        return None if self._neighbors is None else self._neighbors.codes

    def cells(self, codebook: Codebook, emphasis: Emphasis | None, everywhere: bool) -> Cells:
        """The cells of all processes.

        Args:
            codebook: The codes.
            emphasis: As of Cells.of.
            everywhere: Whether each point goes to the nearest of all codes.
        """
        before = self._codes
        self._codes = codes = self._searched(codebook, everywhere)
        if before is None or emphasis is not None or self._cells is None:
            self._cells = self._summed(codebook, codes, emphasis)
        else:
            self._cells = self._cells.move(self._slab, codebook.metric, before, codes)
        return self._cells.of_all()

    def place(self, points: Tensor, codes: Tensor) -> None:
        """Codes (m,) are at these points (m,) now, indices of them among those of all processes."""
        assert self._codes is not None
        inside = (points >= self._own.start) & (points < self._own.stop)
        self._codes = self._codes.clone()
        self._codes[points[inside] - self._own.start] = codes[inside]
        self._renew()

    def moved(self, into: Tensor) -> InMemory:
        """Passes that go on from here after moves of codes, and leave these as they are.

        Args:
            into: (k,) int64, of each code one that its points are near after the moves.
        """
        other = copy(self)
        assert self._codes is not None
        other._codes = into.to(self._codes.device)[self._codes]
        other._renew()
        return other

    def _renew(self) -> None:
        """Codes took other places: sum all cells, and list neighbors, anew."""
        self._cells, self._passes, self._lasts = None, 0, 0

    def _searched(self, codebook: Codebook, everywhere: bool) -> Tensor:
        points = self._slab[0]
        if self._codes is None or not self.is_local:
            return _nearest(points, codebook)
        if everywhere or not self._passes:
            self._neighbors = Neighbors.of(codebook, self._count)
            self._lasts = self._passes = max(_FIRST_LISTS, 2 * self._lasts)
        assert self._neighbors is not None
        self._passes -= 1
        codes, certain = self._neighbors.search(points, codebook, self._codes)
        if everywhere:
            unsure = (~certain).nonzero()[:, 0]
            nearest = _nearest(points[unsure], codebook)
            missed = distributed.summed((nearest != codes[unsure]).sum())
            if int(missed) > _MISSED * self._all:
                self._count = min(2 * self._count, codebook.size // _MOST_ONE_IN)
            codes[unsure] = nearest
        return codes

    def _summed(self, codebook: Codebook, codes: Tensor, emphasis: Emphasis | None) -> Cells:
        points, weights = self._slab
        at_once = slab_size(len(points), points.device)
        slabs = zip(torch.split(points, at_once), _parts(weights, points, at_once), strict=True)
        parts = zip(slabs, torch.split(codes, at_once), strict=True)

        def work(part: tuple[Slab, Tensor]) -> Cells:
            return Cells.of(part[0], codebook, emphasis, part[1])

        return Cells.added(spread(work, parts) if points.is_cpu else map(work, parts), codebook)


def slab_size(points: int, device: torch.device) -> int:
    """Points of a slab, for so many points."""
    return min(_SLAB.get(device.type, _ELSEWHERE), max(_LEAST, points // _SLABS))


def _parts(weights: Tensor | None, points: Tensor, at_once: int) -> Iterable[Tensor | None]:
    if weights is None:
        return [None] * -(-len(points) // at_once)
    return torch.split(weights, at_once)


def nearby_from(dim: int) -> int:
    """Codes of `dim` entries from which on most passes search among neighbors."""
    return _FUSED_FROM if dim <= _FUSED else _NEARBY_FROM


def _nearest(points: Tensor, codebook: Codebook) -> Tensor:
    """(n,) int64: the nearest of all codes; near-ties are not decided."""
    if not _has_fused(points, codebook.size):
        slabs = torch.split(points, slab_size(len(points), points.device))
        search = partial(nearest_codes, codebook=codebook)
        return torch.cat(list(spread(search, slabs) if points.is_cpu else map(search, slabs)))
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    codes, center = centered(codebook)
    rows = codebook.metric.prepare(points) - center
    return torch.from_numpy(faiss.knn(rows.numpy(), codes.numpy(), 1)[1][:, 0])


def _has_fused(points: Tensor, codes: int) -> bool:
    """Whether faiss has a faster search of points (n, dim) among so many codes. Below these sizes it takes another."""
    n, dim = points.shape
    # On macOS torch and faiss each bring an OpenMP, which must not run in one process.
    return points.is_cpu and 2 <= dim <= _FUSED and n * dim >= 1 << 17 and codes >= 64 and sys.platform != "darwin"
