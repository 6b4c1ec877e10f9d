"""How well codes fit latents: their distortion against that of a k-means of as many codes, and against the variance."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import nearest, squared_errors
from codebook_tools.clustering.kmeans import kmeans
from codebook_tools.clustering.metric import prepared
from codebook_tools.clustering.seeding import count_distinct
from codebook_tools.codebook import Codebook
from codebook_tools.runtime.progress import Watch

WORSE = 2.0
"""Times the inertia of k-means: surgeries and trained codebooks stay below 1.6, misplaced ones begin at 3."""

BEYOND = 0.1
"""Share of the way from k-means to one single code: trained codebooks stay below 0.05, misplaced ones begin at 0.15."""

STRANGE = 0.5
"""Excess of codes on latents that they never had to do with; of codes that were trained with the encoder it is less."""

CLOSE = 0.75
"""Misfit of codes on the latents that they are of: 0.5 and less, where they are centroids."""

_ITERATIONS = 10
_LATENTS_A_CENTROID = 8  # fewer, and k-means fits what is chance in them


@dataclass(frozen=True)
class Fit:
    """How well codes fit latents, in mean squared distances.

    Attributes:
        distortion: Of the codes.
        inertia: Of a k-means of as many centroids as there are codes in use (fewer where latents are few), on latents
            that it was not fitted to.
        variance: Of the latents.
    """

    distortion: float
    inertia: float
    variance: float

    @property
    def ratio(self) -> float:
        """Distortion over inertia: 1 for centroids."""
        return self.distortion / max(self.inertia, 1e-9 * self.variance, 1e-30)

    @property
    def excess(self) -> float:
        """0: as k-means; 1: as one code in the middle of all latents; more: worse than that."""
        return (self.distortion - self.inertia) / max(self.variance - self.inertia, 1e-9 * self.variance, 1e-30)

    @property
    def good(self) -> bool:
        """Whether the codes may be of these latents.

        Either number alone errs: where k-means leaves next to nothing any ratio is large, and where latents fill many
        dimensions every excess is.
        """
        return self.misfit <= 1

    @property
    def close(self) -> bool:
        """Whether the codes surely are of these latents: well within the limits."""
        return self.misfit <= CLOSE

    @property
    def strange(self) -> bool:
        """Whether the codes are unrelated to these latents."""
        return self.excess > STRANGE

    @property
    def misfit(self) -> float:
        """The smaller of ratio and excess, each over its own limit."""
        return max(0.0, min(self.ratio / WORSE, self.excess / BEYOND))

    @property
    def summary(self) -> str:
        """The ratio and the share of the variance, in words."""
        of_variance = self.distortion / max(self.variance, 1e-30)
        return f"distortion is {self.ratio:.2g} times that of k-means, {of_variance:.2g} of the variance"


def fit_of(codebook: Codebook, latents: Tensor, seed: int) -> Fit | None:
    """How well the codes fit latents (n, dim), of which each head is a uniform sample.

    Returns:
        None where codes are searched by the dot product, which has no k-means, or latents are too few.
    """
    if not codebook.metric.is_distance or len(latents) < 2 * _LATENTS_A_CENTROID:
        return None
    points, codes = codebook.metric.prepare(latents), prepared(codebook)
    half = len(points) // 2
    clustered, judged = points[:half], points[half:]
    errors, in_use = distortion(codes, judged)
    return Fit(errors, distortion(centroids(codes, clustered, in_use, seed), judged)[0], variance_of(judged))


def centroids(like: Codebook, points: Tensor, k: int, seed: int) -> Codebook:
    """At most k centroids of prepared points (n, dim): fewer where there are few, or equal ones."""
    k = count_distinct(points, enough=max(1, min(k, len(points) // _LATENTS_A_CENTROID)))
    fitted = kmeans(points, k, iterations=_ITERATIONS, seed=seed, metric=like.metric, watch=Watch())
    return replace(like, vectors=fitted.centroids)


def distortion(codes: Codebook, points: Tensor) -> tuple[float, int]:
    """Mean squared distance of prepared points (n, dim) to their codes, and the number of codes in use."""
    chosen = nearest(points, codes)
    return float(squared_errors(points, codes, chosen).mean()), len(torch.unique(chosen))


def left_of(codebook: Codebook, latents: Tensor) -> float:
    """Share of the variance of latents (n, dim) that the codes leave."""
    points = codebook.metric.prepare(latents)
    return distortion(prepared(codebook), points)[0] / max(variance_of(points), 1e-30)


def variance_of(points: Tensor) -> float:
    """Mean squared distance of points (n, dim) to their mean."""
    return float((points - points.mean(0)).double().square().sum(1).mean())
