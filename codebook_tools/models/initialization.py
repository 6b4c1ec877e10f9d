"""Whether rows are what an initialisation drew, from their numbers alone: without torch, for those who only look."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

LIMIT = 5.0
"""Standard deviations: what a drawn codebook does not reach, and what was ever fitted to latents goes far beyond."""


def structure(codes: ArrayLike) -> float:
    """By how many standard deviations the covariance, or the mean, of codes (n, dim) differs from that of independent
    numbers of one variance around 0. Codes that are all alike have no structure: 0.0.

    Source: Ledoit and Wolf 2002, "Some hypothesis tests for the covariance matrix when the dimension is large compared
    to the sample size": n U - dim is normal around 1 with variance 4, whichever of both numbers is larger.
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
    off_centre = float((n * np.square(mean).sum() / scale - dim) / (2.0 * dim) ** 0.5)
    found: float = max(0.0, (n * u - dim - 1) / 2, off_centre)
    return found


def as_initialised(codes: ArrayLike) -> bool:
    """Whether codes (n, dim) are as the usual initialisations leave them: independent, and uniform, or normal with the
    variance 1 of torch's embeddings. Codes of a late residual stage may be independent, too, and are neither."""
    rows = np.asarray(codes, dtype=np.float64)
    deviation = float(rows.std())
    if not drawn(rows) or not deviation:
        return False
    tails = float(np.power(rows / deviation, 4).mean())  # 1.8 of a uniform distribution, 3 of a normal one
    chance = 4 / rows.size**0.5  # four standard deviations of both figures, nearly
    uniform = abs(tails - 1.8) <= 1.2 * chance and float(np.abs(rows).max()) <= (1 + chance) * 3**0.5 * deviation
    return bool(uniform or (abs(deviation - 1) <= chance and abs(tails - 3) <= 5 * chance))


def drawn(codes: ArrayLike) -> bool:
    """Whether nobody ever fitted codes (n, dim) to anything."""
    return structure(codes) <= LIMIT
