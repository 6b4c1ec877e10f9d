"""Pairwise nearest neighbor clustering (PNN), exact on weights and centroids."""

from __future__ import annotations

from heapq import heapify, heappop, heapreplace

import numpy as np
from numpy.typing import NDArray

_COST_BYTES = 32 << 20  # of costs that are computed at a time
_LISTED = 16  # neighbors of a cluster: more last longer, and take longer to compare
_RENEWED = 0.5  # of the clusters: after as many searches one by one, a search for all at once is cheaper
_MARGIN = 1e-9  # relative; far above the rounding that float64 costs gather in a merge after the other

Rows = NDArray[np.float64]
Indices = NDArray[np.int64]


def merge_pairs(rows: Rows, weights: Rows, k: int) -> tuple[Rows, Indices]:
    """Merge the pair of the lowest cost, n1 n2 / (n1 + n2) |c1 - c2|^2, until k are left; among equals the first pair.

    Memory grows with size, not its square: each cluster lists a few neighbors. Time grows with its square at first, for
    all costs are computed once.
    Source: Equitz 1989, "A New Vector Quantization Clustering Algorithm".

    Args:
        rows: (size, dim).
        weights: (size,), positive.
        k: Clusters that are left, at most size.

    Returns:
        (k, dim) weighted means in order of their first member, and (size,) the cluster of each row.
    """
    centers, mass, labels = rows, weights.astype(np.float64), np.arange(len(rows))
    while True:
        clusters = _Clusters(centers, mass)
        left = len(centers) - clusters.merge_copies(len(centers) - k)
        if left > k:
            clusters.list_neighbors()
        while left > k and clusters.searches < _RENEWED * len(centers):
            clusters.merge_cheapest()
            left -= 1
        into = clusters.merged_into(np.arange(len(centers)))
        kept = np.unique(into)
        centers, mass, labels = clusters.centers[kept], clusters.mass[kept], np.searchsorted(kept, into)[labels]
        if len(kept) == k:
            return centers, labels


class _Clusters:
    """Clusters by their first member, each with a list of all its neighbors that cost less than a limit.

    A merged pair is never cheaper, for any third cluster, than its cheaper half. So the cost of a pair stays a lower
    bound when the two are merged with others, a list stays complete below its limit, and the lists of two clusters,
    taken together, are that of the merged one below the lower limit. A cost is computed again only when its lower bound
    is the least of all, and all clusters are searched only for one whose list is used up.

    Attributes:
        centers: (size, dim), weighted means.
        mass: (size,), sums of weights.
        squares: (size,), squared lengths of the centers; infinite for clusters that were merged into others.
        parent: (size,), the cluster that each was merged into, itself where it was not.
        version: (size,), how often each has changed.
        neighbors: (size, _LISTED), the list of each as it was when written, filled up with the cluster itself.
        limit: (size,), the cost below which the list is complete.
        partner: (size,), the cheapest neighbor of each.
        heap: For each cluster a lower bound of its costs, the cluster, its version, and that of its partner, -1 where
            none is known. A bound is a cost where both versions are still the same.
        searches: How many clusters were searched for one by one.
    """

    def __init__(self, rows: Rows, weights: Rows) -> None:
        size, dim = rows.shape
        self.centers, self.mass = rows.copy(), weights.astype(np.float64)
        self.squares = np.einsum("nd,nd->n", rows, rows)
        self.parent, self.partner = np.arange(size), np.arange(size)
        self.version = np.zeros(size, dtype=np.int64)
        self.neighbors = np.repeat(np.arange(size)[:, None], _LISTED, 1)
        self.limit = np.zeros(size)
        self.heap: list[tuple[float, int, int, int]] = []
        self.searches = 0
        # Of squared distances, by the expanded square and by the means after it.
        self._rounding = 64 * (dim + 8) * float(np.finfo(np.float64).eps) * float(self.squares.max())

    def merge_copies(self, most: int) -> int:
        """Merge equal rows, which costs nothing, pair after pair; at most so many. Returns how many were merged."""
        _, first, group = np.unique(self.centers, axis=0, return_index=True, return_inverse=True)
        into = first[group.reshape(-1)]
        copies = np.flatnonzero(into != self.parent)
        copies = copies[into[copies].argsort(kind="stable")][:most]
        np.add.at(self.mass, into[copies], self.mass[copies])
        self.parent[copies], self.squares[copies] = into[copies], np.inf
        return len(copies)

    def list_neighbors(self) -> None:
        """List the neighbors of all clusters."""
        alive = np.flatnonzero(self.parent == np.arange(len(self.parent)))
        for some in np.array_split(alive, 1 + 8 * len(alive) * len(self.parent) // _COST_BYTES):
            least = self._search(some)
            self.heap += [(bound, x, 0, -1) for bound, x in zip(least.tolist(), some.tolist(), strict=True)]
        heapify(self.heap)

    def merge_cheapest(self) -> None:
        """Merge the cheapest pair."""
        while True:
            _, i, version, partners = self.heap[0]
            j = int(self.partner[i])
            if self.parent[i] != i:
                heappop(self.heap)
            elif version == self.version[i] and partners == self.version[j]:
                break
            else:
                heapreplace(self.heap, self._refreshed(i, self.neighbors[i]))
        i, j = min(i, j), max(i, j)
        self.centers[i] += self.mass[j] / (self.mass[i] + self.mass[j]) * (self.centers[j] - self.centers[i])
        self.mass[i] += self.mass[j]
        self.squares[i], self.squares[j] = self.centers[i] @ self.centers[i], np.inf
        self.version[[i, j]] += 1
        self.parent[j] = i
        self.limit[i] = min(self.limit[i], self.limit[j])
        both = np.concatenate([self.neighbors[i], self.neighbors[j]])
        heapreplace(self.heap, self._refreshed(i, both))

    def merged_into(self, clusters: Indices) -> Indices:
        """The clusters that these are part of by now."""
        while True:
            parents = self.parent[clusters]
            if np.array_equal(parents, clusters):
                return clusters
            self.parent[clusters] = self.parent[parents]  # halves the way for the next time
            clusters = parents

    def _refreshed(self, i: int, listed: Indices) -> tuple[float, int, int, int]:
        """The entry of the heap of a cluster, of which all neighbors below its limit are in a list."""
        cost = self._from_list(i, listed)
        if cost is None:
            self.searches += 1
            self._search(np.array([i]))
            cost = self._from_list(i, self.neighbors[i])
        if cost is None:  # more neighbors than are listed cost alike, or there is no other cluster
            others = np.flatnonzero((self.squares < np.inf) & (np.arange(len(self.parent)) != i))
            costs = np.append(self._costs(i, others), np.inf)
            best = int(costs.argmin())
            self.partner[i], cost = np.append(others, i)[best], float(costs[best])
        return cost, i, int(self.version[i]), int(self.version[self.partner[i]])

    def _from_list(self, i: int, listed: Indices) -> float | None:
        """Find the partner in a list, and keep what is left of it. Returns the cost; None where the list is used up."""
        listed = np.unique(self.merged_into(listed))
        listed = listed[listed != i]
        costs = self._costs(i, listed)
        below = costs < self.limit[i]
        listed, costs = listed[below], costs[below]
        if not len(listed):
            return None
        best = int(costs.argmin())
        self.partner[i], cost = listed[best], float(costs[best])
        if len(listed) > _LISTED:
            least = np.partition(costs, _LISTED)[_LISTED]
            listed, self.limit[i] = listed[costs < least], self._lower(least, self.mass[i])
        self.neighbors[i], self.neighbors[i, : len(listed)] = i, listed
        return cost if cost < self.limit[i] else None

    def _costs(self, i: int, others: Indices) -> Rows:
        apart = self.centers[others] - self.centers[i]
        mass = self.mass[others]
        costs: Rows = np.einsum("nd,nd->n", apart, apart) * (mass * self.mass[i] / (mass + self.mass[i]))
        return costs

    def _lower(self, costs: Rows, mass: Rows) -> Rows:
        """Below the exact costs of clusters of a mass, where the computed ones are rounded."""
        lower: Rows = costs * (1 - _MARGIN) - self._rounding * mass
        return lower

    def _search(self, some: Indices) -> Rows:
        """List the neighbors of some clusters, among all. Returns (some,) lower bounds of their costs."""
        costs = self.centers[some] @ self.centers.T
        costs *= -2
        costs += self.squares
        costs += self.squares[some, None]
        costs /= 1 / self.mass + 1 / self.mass[some, None]
        costs[np.arange(len(some)), some] = np.inf
        most = min(_LISTED, costs.shape[1] - 1)
        least = np.partition(costs, most, axis=1)[:, : most + 1]
        row, near = np.nonzero(costs < least[:, most, None])
        self.neighbors[some] = some[:, None]
        self.neighbors[some[row], np.arange(len(row)) - np.searchsorted(row, row)] = near
        self.limit[some] = self._lower(least[:, most], self.mass[some])
        return self._lower(least.min(1), self.mass[some])
