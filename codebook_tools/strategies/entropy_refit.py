"""Entropy-constrained Re-Fit: k-means with a price for bits, which drops rarely used codes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import nearest, squared_errors
from codebook_tools.codebook import REMOVED, Codebook, Latents, Surgery
from codebook_tools.data.latents import joined
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.devices import wide
from codebook_tools.strategies._validation import check_k
from codebook_tools.strategies.refit import Refit

_POINTS_PER_CODE = 256
_GAIN = 1e-4  # relative gain in cost of an iteration for another to follow


@dataclass(frozen=True)
class EntropyRefit:
    """At most k codes that minimize distortion + price · bits, over a head of the latents.

    During the iterations a latent is assigned to the code of the lowest cost, not the nearest one; the model itself
    still assigns the nearest. Codes without latents are left out. It starts from a Re-Fit of the codes in use.
    Source: Chou, Lookabaugh and Gray 1989, "Entropy-constrained vector quantization".

    Attributes:
        k: Most codes of the new codebook.
        price: Of a bit a token, in variances of the latents.
        iterations: Most iterations.
        seed: Of the Re-Fit.
        device: That the work is done on.
    """

    k: int
    price: float
    iterations: int = 100
    seed: int = 0
    device: str = field(default="cpu", repr=False, compare=False)

    def __post_init__(self) -> None:
        check_k(self.k)
        if not 0 <= self.price < float("inf"):
            raise CodebookError(f"a bit cannot cost {self.price} variances; try --lambda 0.01")

    def __call__(self, codebook: Codebook, latents: Latents, counts: Tensor) -> Surgery:
        """Refit to at most k codes, with the cost of a bit in the assignment."""
        if not codebook.metric.is_euclidean:
            raise CodebookError("an entropy-constrained Re-Fit needs a Euclidean codebook; leave out --lambda")
        points = joined(latents)[: _POINTS_PER_CODE * self.k].to(self.device)
        codes = Refit(self.k, init="used", seed=self.seed, device=self.device)(
            codebook, latents, counts
        ).codebook.vectors
        unit = self.price * float(wide(points).var(0, correction=0).sum())
        usage, last = torch.full((self.k,), 1 / self.k, dtype=torch.float64), float("inf")
        for _ in range(self.iterations):
            codes, usage, cost = _step(points, codes.to(points.device), usage, unit)
            if last - cost <= _GAIN * cost:
                break
            last = cost
        return Surgery(replace(codebook, vectors=codes.cpu()), torch.full((codebook.size,), REMOVED))


def _step(points: Tensor, codes: Tensor, usage: Tensor, unit: float) -> tuple[Tensor, Tensor, float]:
    """The new codes, the fraction of points of each, and the mean cost of the old ones. unit: price of a bit."""
    # The price of a code is a further dimension, in which all latents are 0: the nearest code is then the cheapest.
    prices = (-usage.log2() * unit).sqrt().float().to(points.device)
    longer = Codebook(torch.cat([codes, prices[:, None]], 1))
    rows = torch.cat([points, points.new_zeros(len(points), 1)], 1)
    chosen = nearest(rows, longer)
    cost = float(squared_errors(rows, longer, chosen).mean())
    hits = torch.bincount(chosen, minlength=len(codes))
    sums = points.new_zeros(codes.shape).index_add_(0, chosen, points)
    used = hits > 0
    return sums[used] / hits[used][:, None], wide(hits[used]) / len(points), cost
