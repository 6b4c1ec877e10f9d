"""Seeds for which no k-means followed: each code is some latent, not the mean of those that it stands for."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import nearest, squared_errors
from codebook_tools.clustering.metric import prepared
from codebook_tools.codebook import Codebook
from codebook_tools.diagnosis.evidence import BookEvidence, Evidence
from codebook_tools.diagnosis.finding import Finding, Verdict, not_checked, of_each_book
from codebook_tools.strategies import declaration

SEEDS = 0.7
"""Share of the codes that are seeds: of a codebook grown to twice its size it is 0.5, of a trained one 0.2, and of
centroids 0."""

OFF = 0.1
"""Share of a cell's error that its code has by lying off the mean: where latents fill many dimensions, one drawn from
the cell has twice that and more, and a code that lags behind an encoder in training less."""

_ON = 1e-8  # of the latents' variance: a code that lies nearer to a latent is that latent, but for rounding
_OFF_AT_ALL = 0.01  # share of a cell's error: of a cell whose latents are all alike the code may be one of them
_LATENTS = 8  # of a cell at least, or its mean is chance
_MOST = 0.5  # of the codes: as many must have that


def no_lloyd(evidence: Evidence) -> Finding:
    """Found where most codes are latents, off the means of their cells.

    Suspicious where the surgery does so on purpose, and where codes only lie off: those may lag behind an encoder in
    training.
    """
    finding = of_each_book(_of_book)(evidence)
    on_purpose = declaration(evidence.command, "summary") and not declaration(evidence.command, "clusters")
    return replace(finding, verdict="suspicious") if on_purpose and finding.verdict == "found" else finding


def _of_book(book: BookEvidence) -> Finding:
    if book.fit is None or not book.fit.good:
        return not_checked("the codes are not centroids of these latents at all")
    points, codes = book.codebook.metric.prepare(book.latents), prepared(book.codebook)
    hits, gaps, errors = cells(points, codes)
    enough = hits >= _LATENTS
    if int(enough.sum()) <= _MOST * int((hits > 0).sum()):
        return not_checked(f"{len(points)} latents are too few for the means of {codes.size} cells; give more --data")
    off = float((gaps > OFF * errors)[enough].float().mean())
    # Of all latents some are in the sample, and as many of the seeds.
    sampled = len(points) / int(book.counts.sum())
    are = (gaps > _OFF_AT_ALL * errors) & _are_latents(points, codes)
    latents = min(1.0, float(are[enough].float().mean()) / sampled)
    summary = f"{off:.0%} of the codes lie far off the mean of their latents, {latents:.0%} are latents themselves"
    verdict: Verdict = "found" if latents > SEEDS else "suspicious" if off > SEEDS else "ok"
    return Finding(verdict, max(off, latents), SEEDS, summary)


def cells(points: Tensor, codes: Codebook) -> tuple[Tensor, Tensor, Tensor]:
    """What the cells of codes say of them.

    What all codes have in common of the way to their means is left out: an encoder in training moves away from all of
    them alike.

    Args:
        points: (n, dim), prepared.
        codes: Prepared.

    Returns:
        (size,) each: points in the cell; the squared distance of the code to their mean, less what is chance in that;
        and their mean squared distance to the code.
    """
    chosen = nearest(points, codes)
    hits = torch.bincount(chosen, minlength=codes.size)
    means = torch.zeros_like(codes.vectors).index_add_(0, chosen, points) / hits.clamp(min=1)[:, None]
    means = codes.metric.prepare(means)
    apart = squared_errors(points, codes, chosen).float()
    errors = torch.zeros(codes.size).index_add_(0, chosen, apart) / hits.clamp(min=1)
    offsets = codes.vectors - means
    chance = (errors - offsets.square().sum(1)).clamp(min=0) / hits.clamp(min=1)
    return hits, _alone(codes.vectors, offsets, hits).square().sum(1) - chance, errors


def _alone(codes: Tensor, offsets: Tensor, hits: Tensor) -> Tensor:
    """(size, dim): offsets less the shift and the stretch that explain most of them."""
    shares = (hits / hits.sum())[:, None]
    around, apart = codes - (shares * codes).sum(0), offsets - (shares * offsets).sum(0)
    stretch = (shares * around * apart).sum() / (shares * around.square()).sum().clamp(min=1e-30)
    return apart - stretch * around


def _are_latents(points: Tensor, codes: Codebook) -> Tensor:
    """(size,) bool: which codes are one of the points (n, dim)."""
    closest = points[nearest(codes.vectors, Codebook(points))]
    variance = (points - points.mean(0)).square().sum(1).mean()
    return (codes.vectors - closest).square().sum(1) <= _ON * variance
