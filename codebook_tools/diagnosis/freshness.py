"""Whether codes are what an initialisation drew: noise that is alike in all directions, around 0."""

from __future__ import annotations

import torch
from torch import Tensor

LIMIT = 5.0
"""Standard deviations: what a drawn codebook does not reach, and what was ever fitted to latents goes far beyond."""


LEAST = 8
"""Codes, of which fewer do not tell."""


def structure(codes: Tensor) -> float:
    """By how many standard deviations the covariance, or the mean, of codes (n, dim) differs from that of independent
    numbers of one variance around 0. Codes that are all alike have no structure: 0.0.

    Source: Ledoit and Wolf 2002, "Some hypothesis tests for the covariance matrix when the dimension is large compared
    to the sample size": n U - dim is normal around 1 with variance 4, whichever of both numbers is larger.
    """
    n, dim = codes.shape
    rows = codes.double()
    apart = rows - rows.mean(0)
    covariance = apart.T @ apart / max(n - 1, 1)
    scale = float(covariance.trace()) / dim
    if scale <= 1e-24 * float(rows.square().mean()) or n < 3:
        return 0.0
    u: float = float((covariance / scale - torch.eye(dim, dtype=torch.float64)).square().sum()) / dim
    off_centre = (n * float(rows.mean(0).square().sum()) / scale - dim) / (2 * dim) ** 0.5
    return max(0.0, (n * u - dim - 1) / 2, float(off_centre))


def drawn(codes: Tensor) -> bool:
    """Whether nobody ever fitted codes (n, dim) to anything."""
    return structure(codes) <= LIMIT


def born_dead(codes: Tensor, dead: Tensor) -> Tensor:
    """(size,) bool: those of the dead codes (size, dim) that were never trained. dead: (size,) bool.

    Drawn ones are about as long as each other, the more so the more dimensions there are; those of another length have
    been in use once, and moved.
    """
    rows = codes[dead]
    if len(rows) < LEAST:
        return torch.zeros_like(dead)
    lengths = rows.norm(dim=1)
    typical = float(lengths.quantile(0.25))
    alike = (lengths - typical).abs() <= 2 * typical / codes.shape[1] ** 0.5
    if int(alike.sum()) < LEAST or not drawn(rows[alike]):
        return torch.zeros_like(dead)
    found = dead.clone()
    found[dead] = alike
    return found


def untrained(codes: Tensor, dead: Tensor) -> bool:
    """Whether codes (size, dim) as a whole are as drawn: all of them, or half and more, and those dead."""
    return drawn(codes) or 2 * int(born_dead(codes, dead).sum()) >= len(codes)
