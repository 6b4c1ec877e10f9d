"""Whether codes are what an initialization drew: noise that is alike in all directions, around 0."""

from __future__ import annotations

import torch
from torch import Tensor

from codebook_tools.models.initialization import drawn

LEAST = 8
"""Codes, of which fewer do not tell."""


def born_dead(codes: Tensor, dead: Tensor) -> Tensor:
    """The dead codes that were never trained.

    Drawn ones are about as long as each other, the more so the more dimensions there are; those of another length have
    been in use once, and moved.

    Args:
        codes: (size, dim).
        dead: (size,) bool.

    Returns:
        (size,) bool; none where fewer than LEAST are of one length.
    """
    rows = codes[dead]
    if len(rows) < LEAST:
        return torch.zeros_like(dead)
    lengths = rows.norm(dim=1)
    typical = float(lengths.quantile(0.25))
    alike = (lengths - typical).abs() <= 2 * typical / codes.shape[1] ** 0.5
    if int(alike.sum()) < LEAST or not drawn(rows[alike]):
        return torch.zeros_like(dead)
    born = dead.clone()
    born[dead] = alike
    return born


def untrained(codes: Tensor, dead: Tensor) -> bool:
    """Whether codes (size, dim) as a whole are as drawn: all of them, or half and more, and those dead."""
    return drawn(codes) or 2 * int(born_dead(codes, dead).sum()) >= len(codes)
