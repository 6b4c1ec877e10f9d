"""Coverage: the share of latents near their code, by the standard of a k-means of the same size."""

from __future__ import annotations

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import nearest, squared_errors
from codebook_tools.clustering.kmeans import kmeans
from codebook_tools.clustering.seeding import Init, count_distinct, overflow
from codebook_tools.codebook import Codebook
from codebook_tools.data.dataset import Media
from codebook_tools.data.splits import shuffled
from codebook_tools.evaluation.accumulators import Draw
from codebook_tools.evaluation.one_pass import LatentSource, run_pass
from codebook_tools.models.model import Model
from codebook_tools.runtime.progress import Watch

POINTS = 20_000
"""Latents that the reference k-means is fitted to."""

_IMAGES_FOR = 4  # times POINTS are encoded, of which POINTS are drawn: neighbors in an image are alike
_ITERATIONS = 10
_PERCENTILE = 0.95
_SEEDED_WELL = 2048  # codes up to which k-means++ takes seconds


def reference_latents(model: Model, calibration: Media, *, seed: int, batch: int, stage: int = 0) -> Tensor | None:
    """Draw the latents that a reference k-means is fitted to.

    The draw depends only on names and seed, so that all states of a model are compared on the same latents.

    Args:
        model: Encodes the images.
        calibration: The images.
        seed: Of the draw.
        batch: Images per batch.
        stage: Index of the codebook whose latents are drawn.

    Returns:
        (n, dim) float32, n at most POINTS; None without any image.
    """
    drawn = calibration.subset(shuffled(calibration.items, seed, _IMAGES_FOR * POINTS))
    # The whole data in every process: each must know how many latents an image has.
    first = next(model.latents(drawn.whole(), batch, stage).by_item(), None)
    if first is None:
        return None
    few = drawn.subset(drawn.items[: -(-_IMAGES_FOR * POINTS // first[1].shape[1])])
    draw = Draw(model.books[stage].codebook, ("latents",), seed, POINTS)
    run_pass(LatentSource(model.latents(few, batch, stage)), [draw], Watch())
    return draw.sampler.columns()[0]


def reference_distance(latents: Tensor | None, codebook: Codebook, *, seed: int) -> float | None:
    """The 95th percentile of squared distances from latents to their centroids in a k-means of the codebook's size.

    Distances are those of the distortion, between emitted vectors.

    Args:
        latents: (n, dim) of `reference_latents`.
        codebook: Gives the size and the metric.
        seed: Of the k-means.

    Returns:
        None without latents, with fewer distinct ones than codes, or where distances overflow float32, as after a
        diverged training.
    """
    if latents is None or overflow(latents) or count_distinct(latents, enough=codebook.size) < codebook.size:
        return None
    points = codebook.metric.emit(latents)
    init: Init = "kmeans++" if codebook.size <= _SEEDED_WELL else "random"
    result = kmeans(points, codebook.size, init=init, iterations=_ITERATIONS, seed=seed, watch=Watch())
    centroids = Codebook(result.centroids)
    errors = squared_errors(points, centroids, nearest(points, centroids))
    return float(torch.quantile(errors.double(), _PERCENTILE))
