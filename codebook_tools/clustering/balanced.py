"""Balanced k-means: codes of even use under nearest assignment, by less than the square of the distance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import nearest, squared_errors
from codebook_tools.codebook import Codebook

BALANCED = 1.0
"""Exponent of the distance in balanced k-means. Lower ones give still more even use, and outliers err more."""

_FLOOR = 0.05  # of the median distance: the weight at a code would be infinite
_ENOUGH = 65_536  # points that the median is taken of


@dataclass(frozen=True, eq=False)
class Emphasis:
    """Weights by which k-means minimizes the mean of a power of the distance, in place of its square.

    Weighted means, with the weights of the distances before, lower that mean (iteratively reweighted least squares,
    Weiszfeld 1937). The lower the power r, the more evenly codes are used: for a density f in d dimensions the best
    codes have a density proportional to f^(d/(d+r)) (Zador 1982), and outliers are worth fewer codes.

    Nothing constrains the assignment, so the balance is that of nearest codes, and of new data. Constrained ones
    (min-cost flow, Sinkhorn, greedy filling) balance clusters that nearest assignment does not have: searched by the
    nearest code, their centroids may be used less evenly than those of plain k-means.

    Attributes:
        power: Of the distance, above 0; with 2 all weights are 1.
        floor: () squared distance below which the weight grows no further.
    """

    power: float
    floor: Tensor

    @staticmethod
    def at(points: Tensor, codebook: Codebook, power: float) -> Emphasis:
        """The emphasis whose floor suits points (n, dim), of which each head is a uniform sample, and their codes."""
        head = points[:_ENOUGH]
        return Emphasis.of(squared_errors(head, codebook, nearest(head, codebook)), power)

    @staticmethod
    def of(errors: Tensor, power: float) -> Emphasis:
        """The emphasis whose floor suits squared distances (n,)."""
        middle = errors.median()
        scale = torch.where(middle > 0, middle, errors.mean())  # most latents may be copies of codes
        return Emphasis(power, (_FLOOR**2 * scale).clamp(min=torch.finfo(torch.float32).tiny))

    def weights(self, errors: Tensor) -> Tensor:
        """(n,) of squared distances (n,). Weight times squared distance is a power of the distance, above the floor."""
        return errors.clamp(min=self.floor.to(errors)).pow(self.power / 2 - 1)
