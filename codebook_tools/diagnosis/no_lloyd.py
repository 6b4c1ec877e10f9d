"""Seeds for which no k-means followed: each code is some latent, not the mean of those that it stands for."""

from __future__ import annotations

from dataclasses import replace

import torch

from codebook_tools.assignment import nearest, squared_errors, unit
from codebook_tools.codebook import Lookup
from codebook_tools.diagnosis.check import Finding, judged, not_checked, of_each_book
from codebook_tools.diagnosis.evidence import BookEvidence, Evidence
from codebook_tools.diagnosis.fit import by_place, places

OFF = 0.1
"""Share of a cell's error that its code has by lying off the mean: a latent drawn from the cell has twice that and
more, a code that lags behind an encoder in training less."""

SEEDS = 0.7
"""Share of such codes: of seeds it is 0.85 and more, of a codebook grown to twice its size 0.5, of trained ones 0.2."""

KEEP = ("prune", "quantize", "restart", "grow")
"""Surgeries of this package that keep codes, or place them at latents, without k-means after it, on purpose."""

_LATENTS = 8  # of a cell at least, or its mean is chance
_MOST = 0.5  # of the codes: as many must have that


def no_lloyd(evidence: Evidence) -> Finding:
    """Found where most codes lie off the means of their cells; suspicious where the surgery that did it says so."""
    found = of_each_book(_of_book)(evidence)
    meant = found.verdict == "found" and evidence.command in KEEP
    return replace(found, verdict="suspicious") if meant else found


def _of_book(book: BookEvidence) -> Finding:
    if book.fit is None or not book.fit.good:
        return not_checked("the codes are not centroids of these latents at all")
    points, codes = places(book.codebook, book.latents), by_place(book.codebook)
    chosen = nearest(points, codes)
    size, dim = codes.vectors.shape
    hits = torch.bincount(chosen, minlength=size)
    enough = hits >= _LATENTS
    if int(enough.sum()) <= _MOST * int((hits > 0).sum()):
        return not_checked(f"{len(points)} latents are too few for the means of {size} cells; give more --data")
    sums = points.new_zeros(size, dim).index_add_(0, chosen, points)
    means = sums / hits.clamp(min=1)[:, None]
    if codes.lookup is Lookup.COSINE:
        means = unit(means)
    errors = points.new_zeros(size).index_add_(0, chosen, squared_errors(points, codes, chosen)) / hits.clamp(min=1)
    gaps = (codes.vectors - means).square().sum(1)
    chance = (errors - gaps).clamp(min=0) / hits.clamp(min=1)  # by which a mean of so few errs itself
    off = ((gaps - chance) > OFF * errors)[enough].float().mean()
    told = f"{float(off):.0%} of the codes lie off the mean of their latents"
    return Finding(judged(float(off), SEEDS), float(off), SEEDS, told)
