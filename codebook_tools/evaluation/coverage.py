"""Coverage: how much of the latents' distribution the codes reach, against a k-means of the same size."""

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
"""Latents that the reference k-means sees."""

_IMAGES_FOR = 4  # so many times POINTS are encoded, and POINTS drawn of them: neighbours in an image are alike
_ITERATIONS = 10
_PERCENTILE = 0.95
_SEEDED_WELL = 2048  # codes, up to which k-means++ takes seconds


def reference_latents(model: Model, calibration: Media, *, seed: int, batch: int, stage: int = 0) -> Tensor | None:
    """(n, dim) float32: POINTS or fewer latents that meet the book `stage`, drawn by seed; None without any image.

    Which they are depends on names and seed alone, so that every state of a model is held against the same ones.
    """
    drawn = calibration.subset(shuffled(calibration.items, seed))
    # Whole: every process must know how many latents an image has.
    first = next(model.latents(drawn.whole(), batch, stage).by_item(), None)
    if first is None:
        return None
    few = drawn.subset(drawn.items[: -(-_IMAGES_FOR * POINTS // first[1].shape[1])])
    draw = Draw(model.books[stage].codebook, ("latents",), seed, POINTS)
    run_pass(LatentSource(model.latents(few, batch, stage)), [draw], Watch())
    return draw.sampler.columns()[0]


def reference_distance(latents: Tensor | None, codebook: Codebook, *, seed: int) -> float | None:
    """The 95th percentile of the latents' squared distances to their centroids, in a k-means of codebook.size.

    latents: (n, dim), as `reference_latents` gives them. None where they are none, fewer distinct ones than codes, or
    so far off, after a training that went wrong, that distances overflow. Those are what distortion is the mean of:
    between what is emitted.
    """
    if latents is None or overflow(latents) or count_distinct(latents, enough=codebook.size) < codebook.size:
        return None
    points = codebook.metric.emit(latents)
    init: Init = "kmeans++" if codebook.size <= _SEEDED_WELL else "random"
    centroids = Codebook(
        kmeans(points, codebook.size, init=init, iterations=_ITERATIONS, seed=seed, watch=Watch()).centroids
    )
    errors = squared_errors(points, centroids, nearest(points, centroids))
    return float(torch.quantile(errors.double(), _PERCENTILE))
