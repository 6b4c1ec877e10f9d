"""Pairwise nearest neighbour: clustering by merging, exact on weights and centroids."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LOOK_BYTES = 64 << 20  # of costs that are looked at together


def merge_pairs(
    rows: NDArray[np.float64], weights: NDArray[np.float64], k: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Merge the pair that costs least, n1 n2 / (n1 + n2) |c1 - c2|^2, until k are left; among equals the first pair.

    rows (size, dim), weights (size,) positive -> (k, dim) weighted means in order of their first member, (size,)
    labels. Memory grows with size, not its square: each cluster knows its cheapest partner of higher index.
    Source: Equitz 1989, "A New Vector Quantization Clustering Algorithm".
    """
    from scipy.spatial.distance import cdist

    size = len(rows)
    centres, mass = rows.copy(), weights.astype(np.float64)
    alive, labels = np.ones(size, dtype=bool), np.arange(size)
    partner, cost = np.full(size, size), np.full(size, np.inf)

    def costs(some: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = cdist(centres[some], centres[others], "sqeuclidean")
        found *= mass[some, None] * mass[others] / (mass[some, None] + mass[others])
        return found

    def look(some: NDArray[np.int64]) -> None:
        """Find the cheapest partner of higher index of each."""
        others = np.flatnonzero(alive)
        for part in np.array_split(some, 1 + 8 * len(some) * len(others) // _LOOK_BYTES):
            found = costs(part, others)
            found[others <= part[:, None]] = np.inf
            best = found.argmin(1)
            partner[part], cost[part] = others[best], found[np.arange(len(part)), best]

    look(np.arange(size))
    for _ in range(size - k):
        i = int(cost.argmin())
        j = int(partner[i])
        centres[i] += mass[j] / (mass[i] + mass[j]) * (centres[j] - centres[i])
        mass[i] += mass[j]
        alive[j], cost[j] = False, np.inf
        labels[labels == j] = i
        stale = alive & ((partner == i) | (partner == j))
        stale[i] = True
        look(np.flatnonzero(stale))  # the others' partners stay: a merged pair is never cheaper than its cheaper half
    kept = np.flatnonzero(alive)
    return centres[kept], np.searchsorted(kept, labels)
