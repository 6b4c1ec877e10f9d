"""Sums of floats that are not rounded, so that neither order nor parts change them."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from codebook_tools.errors import NotFiniteError

LIMBS = 3
"""float64 numbers that represent a sum: each is nearest to the rest that those before it leave."""


def exact(value: float) -> Fraction:
    """A float as a fraction, whose sums are not rounded. Raises NotFiniteError where it is not finite."""
    if not math.isfinite(value):
        raise NotFiniteError(f"squared errors add up to {value}: latents or codes are too large for float32")
    return Fraction(value)


def limbs(total: Fraction) -> Tensor:
    """(LIMBS,) float64 that add up to a fraction: to 159 bits, enough for sums of any realistic length."""
    parts = list[float]()
    for _ in range(LIMBS):
        parts.append(float(total))
        total -= Fraction(parts[-1])
    return torch.tensor(parts, dtype=torch.float64)


def from_limbs(values: Tensor) -> Fraction:
    """The sum of floats, (n,), without rounding."""
    return sum(map(exact, values.tolist()), Fraction(0))
