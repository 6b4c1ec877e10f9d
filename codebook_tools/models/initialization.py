"""Whether codes are as an initialization draws them, from their numbers alone; without torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

LIMIT = 5.0
"""Standard deviations of `structure` that a random codebook does not reach, and a trained one exceeds by far."""


def structure(codes: ArrayLike) -> float:
    """How far codes are from independent numbers of one variance around 0, by their covariance and their mean.

    Source: Ledoit and Wolf 2002, "Some hypothesis tests for the covariance matrix when the dimension is large compared
    to the sample size": n U - dim is normal around 1 with variance 4, whichever of both numbers is larger.

    Args:
        codes: (n, dim).

    Returns:
        Standard deviations, >= 0; 0.0 for codes that are all equal.
    """
    rows = np.asarray(codes, dtype=np.float64)
    n, dim = rows.shape
    mean = rows.mean(0)
    apart = rows - mean
    covariance = apart.T @ apart / max(n - 1, 1)
    scale = float(np.trace(covariance)) / dim
    if scale <= 1e-24 * float(np.square(rows).mean()) or n < 3:
        return 0.0
    u = float(np.square(covariance / scale - np.eye(dim)).sum()) / dim
    off_center = float((n * np.square(mean).sum() / scale - dim) / (2.0 * dim) ** 0.5)
    distance: float = max(0.0, (n * u - dim - 1) / 2, off_center)
    return distance


def as_initialized(codes: ArrayLike) -> bool:
    """Whether codes (n, dim) are as usual initializations draw them.

    That is independent, and uniform, or normal with the variance 1 of torch's embeddings. Codes of a late residual
    stage may be independent, too, but are neither.
    """
    rows = np.asarray(codes, dtype=np.float64)
    deviation = float(rows.std())
    if not drawn(rows) or not deviation:
        return False
    tails = float(np.power(rows / deviation, 4).mean())  # 1.8 of a uniform distribution, 3 of a normal one
    chance = 4 / rows.size**0.5  # four standard deviations of both figures, nearly
    uniform = abs(tails - 1.8) <= 1.2 * chance and float(np.abs(rows).max()) <= (1 + chance) * 3**0.5 * deviation
    return bool(uniform or (abs(deviation - 1) <= chance and abs(tails - 3) <= 5 * chance))


def drawn(codes: ArrayLike) -> bool:
    """Whether codes (n, dim) have no more structure than random numbers."""
    return structure(codes) <= LIMIT
