"""Re-Fit: rebuild the codebook from the latents by k-means."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from codebook_tools.assignment import nearest, unit
from codebook_tools.codebook import REMOVED, Codebook, Emit, Latents, Lookup, Surgery
from codebook_tools.errors import CodebookError
from codebook_tools.kmeans import Init, draw_by_error, kmeans, seeds
from codebook_tools.watch import Watch


@dataclass(frozen=True)
class Refit:
    """k centroids of the latents, by full Lloyd to convergence. No old code keeps its identity.

    Codes found by cosine are centroids of the latents' directions; where rows are given out as they stand, they are the
    means of the latents nearest to those.
    k: new size. init: how the seeds are drawn; "used" starts from the k most used codes, filled up with latents drawn
    by squared error where fewer are in use. iterations: the most of Lloyd. seed: of the seeding.
    watch: is told of the progress.
    Source: Hu et al. 2021, "Global Context with Discrete Diffusion in VQ Modelling" (VQ-DDM, arXiv 2112.01799).
    """

    k: int
    init: Literal["kmeans++", "afkmc2", "used", "random"] = "kmeans++"
    iterations: int = 300
    seed: int = 0
    watch: Watch = field(default_factory=Watch, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, way_out in (("k", "--k 1 or more"), ("iterations", "--iterations 1 or more")):
            if getattr(self, name) < 1:
                raise CodebookError(f"{name}={getattr(self, name)} is below 1; use {way_out}")

    def __call__(self, codebook: Codebook, latents: Latents, counts: Tensor) -> Surgery:
        cosine = codebook.lookup is Lookup.COSINE
        if not cosine and (codebook.lookup, codebook.emit) != (Lookup.EUCLIDEAN, Emit.RAW):
            raise CodebookError(
                f"refit has no k-means for {codebook.lookup.value} lookup with {codebook.emit.value} rows"
            )
        points = torch.cat(list(latents))
        init: Init | Tensor = self._from_used(codebook, points, counts) if self.init == "used" else self.init
        places = unit(points) if cosine else points
        if isinstance(init, Tensor) and cosine:
            init = unit(init)
        found = kmeans(
            places, self.k, init=init, iterations=self.iterations, seed=self.seed, spherical=cosine, watch=self.watch
        )
        new = replace(codebook, vectors=found.centroids)
        if cosine and codebook.emit is Emit.RAW:
            new = replace(new, vectors=_means(points, new))
        return Surgery(new, torch.full((codebook.size,), REMOVED))

    def _from_used(self, codebook: Codebook, points: Tensor, counts: Tensor) -> Tensor:
        order = counts.argsort(descending=True, stable=True)[: self.k]
        used = replace(codebook, vectors=codebook.vectors[order[counts[order] > 0]])
        if not used.size:
            return seeds(points, self.k, "kmeans++", self.seed)
        return torch.cat([used.vectors, draw_by_error(points, used, self.k - used.size, self.seed)])


def _means(points: Tensor, directions: Codebook) -> Tensor:
    """(size, dim): of each direction, the mean of the points (n, dim) nearest to it; itself where there are none."""
    codes, zeros = nearest(points, directions), torch.zeros_like(directions.vectors)
    counts = torch.bincount(codes, minlength=directions.size)[:, None]
    sums = zeros.double().index_add_(0, codes, points.double())
    return torch.where(counts > 0, sums / counts.clamp(min=1), directions.vectors.double()).float()
