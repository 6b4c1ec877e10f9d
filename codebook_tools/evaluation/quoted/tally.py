"""The exact sums of a quoted figure, and its value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Self

import torch
from torch import Tensor

from codebook_tools.errors import CodebookError
from codebook_tools.evaluation import metrics
from codebook_tools.evaluation.exact import LIMBS, from_limbs, limbs

GRID = 2.0**-16
"""Features of a set are rounded to multiples of it: their sums are sums of integers, the same in any order."""


@dataclass(frozen=True, eq=False)
class Tally:
    """Exact sums of a figure.

    Attributes:
        count: Items, or values, that `total` is over.
        skipped: Items that the figure is not defined for.
        total: Of the scores.
        moments: (2, dim + 1, dim) int64, of images and of reconstructions: the sum of the features in units of GRID in
            the first row, and the sum of their outer products below; None of a mean.
    """

    count: int = 0
    skipped: int = 0
    total: Fraction = Fraction(0)
    moments: Tensor | None = None

    def __add__(self, other: Self) -> Self:
        moments = other.moments if self.moments is None else self.moments
        if self.moments is not None and other.moments is not None:
            moments = self.moments + other.moments
        return replace(
            self,
            count=self.count + other.count,
            skipped=self.skipped + other.skipped,
            total=self.total + other.total,
            moments=moments,
        )

    @property
    def value(self) -> float | None:
        """The mean of the scores, or the Fréchet distance of the features; None of too few items."""
        if self.moments is None:
            return float(self.total / self.count) if self.count else None
        if self.count < 2:
            return None
        means, covariances = zip(*(_gaussian(moments, self.count) for moments in self.moments), strict=True)
        return metrics.frechet_distance(*means, *covariances)

    def packed(self) -> tuple[Tensor, Tensor]:
        """All numbers as two flat tensors, int64 and float64. Adding the tensors of one figure adds the tallies."""
        moments = [] if self.moments is None else [self.moments.flatten()]
        return torch.cat([torch.tensor([self.count, self.skipped]), *moments]), limbs(self.total)

    @classmethod
    def unpacked(cls, integers: Tensor, floats: Tensor) -> Self:
        """The inverse of `packed`. Raises ValueError for tensors of other lengths."""
        rest = len(integers) - 2
        dim = int(((1 + 2 * rest) ** 0.5 - 1) / 2) if rest > 0 else 0
        if rest != 2 * dim * (dim + 1) or len(floats) != LIMBS:
            raise ValueError(f"{len(integers)} and {len(floats)} numbers are no sums of a figure")
        moments = integers[2:].reshape(2, dim + 1, dim) if dim else None
        count, skipped = integers[:2].tolist()
        return cls(count, skipped, from_limbs(floats), moments)


def _gaussian(moments: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Mean and unbiased covariance of n features, float64."""
    sums, products = moments[0].double() * GRID, moments[1:].double() * GRID**2
    mean = sums / n
    return mean, (products - n * mean[:, None] * mean) / (n - 1)


def moments_of(features: Tensor) -> Tensor:
    """The sums of features, (n, dim) of any floating dtype, and of their outer products, as Tally.moments has them.

    Raises:
        CodebookError: A feature is too large for exact sums.
    """
    whole = (features.cpu().double() / GRID).round()
    # A float64 product of integers is exact while all of its partial sums stay below 2**53.
    if not bool((whole.abs() < _LARGEST).all()):
        raise CodebookError(f"features reach {float(features.abs().max()):.4g}; they are expected within ±128")
    parts = [torch.cat([part.sum(0, keepdim=True), part.T @ part]).long() for part in torch.split(whole, _AT_ONCE)]
    return torch.stack(parts).sum(0)


_LARGEST, _AT_ONCE = 2.0**23, 128


def remarks(tallies: Mapping[str, Tally], many: str) -> list[str]:
    """What limits figures, a line each. tallies: by name of the figure. many: the items, in words."""
    lines = list[str]()
    for name, tally in tallies.items():
        if tally.skipped:
            of = f"{tally.skipped} of {tally.count + tally.skipped} {many}"
            lines.append(f"{name} is not defined for {of}, which are not counted: they are too short or silent")
        if tally.moments is not None and tally.count <= (dim := tally.moments.shape[-1]):
            why = f"the covariances of its {dim:,} features are singular"
            lines.append(f"{name} of {tally.count} {many} is far above that of many: {why}")
    return lines
