"""Pairwise nearest neighbor clustering (PNN), exact on weights and centroids."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_COST_BYTES = 64 << 20  # of costs that are computed at a time


def merge_pairs(
    rows: NDArray[np.float64], weights: NDArray[np.float64], k: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Merge the pair of the lowest cost, n1 n2 / (n1 + n2) |c1 - c2|^2, until k are left; among equals the first pair.

    Memory grows with size, not its square: each cluster stores its cheapest partner of higher index.
    Source: Equitz 1989, "A New Vector Quantization Clustering Algorithm".

    Args:
        rows: (size, dim).
        weights: (size,), positive.
        k: Clusters that are left, at most size.

    Returns:
        (k, dim) weighted means in order of their first member, and (size,) the cluster of each row.
    """
    from scipy.spatial.distance import cdist

    size = len(rows)
    centers, mass = rows.copy(), weights.astype(np.float64)
    alive, labels = np.ones(size, dtype=bool), np.arange(size)
    partner, cost = np.full(size, size), np.full(size, np.inf)

    def costs(some: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.float64]:
        pairs: NDArray[np.float64] = cdist(centers[some], centers[others], "sqeuclidean")
        pairs *= mass[some, None] * mass[others] / (mass[some, None] + mass[others])
        return pairs

    def find_partners(some: NDArray[np.int64]) -> None:
        """Find the cheapest partner of higher index of each."""
        others = np.flatnonzero(alive)
        for part in np.array_split(some, 1 + 8 * len(some) * len(others) // _COST_BYTES):
            pairs = costs(part, others)
            pairs[others <= part[:, None]] = np.inf
            best = pairs.argmin(1)
            partner[part], cost[part] = others[best], pairs[np.arange(len(part)), best]

    find_partners(np.arange(size))
    for _ in range(size - k):
        i = int(cost.argmin())
        j = int(partner[i])
        centers[i] += mass[j] / (mass[i] + mass[j]) * (centers[j] - centers[i])
        mass[i] += mass[j]
        alive[j], cost[j] = False, np.inf
        labels[labels == j] = i
        stale = alive & ((partner == i) | (partner == j))
        stale[i] = True
        # The partners of all others stay: a merged pair is never cheaper than its cheaper half.
        find_partners(np.flatnonzero(stale))
    kept = np.flatnonzero(alive)
    return centers[kept], np.searchsorted(kept, labels)
