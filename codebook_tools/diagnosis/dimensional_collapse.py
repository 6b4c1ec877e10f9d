"""Latents that vary in next to no direction: an encoder that makes such ones gives a codebook nothing to tell apart."""

from __future__ import annotations

from codebook_tools.diagnosis.check import Finding, not_checked
from codebook_tools.diagnosis.evidence import BookEvidence
from codebook_tools.diagnosis.fit import by_place, places
from codebook_tools.metrics import covariance_of, dimensions_that_hold, participation_ratio

EACH = 32
"""Dimensions of a latent, for each of which one that holds variance is to be expected at least: trained encoders with
64 dimensions that work have 4 and more."""

_LEAST = 3  # dimensions, of which fewer have nothing to lose


def dimensional_collapse(book: BookEvidence) -> Finding:
    """Found where 99 % of the latents' variance lies along a line, or in very few of many dimensions."""
    dim = book.codebook.dim
    if dim < _LEAST:
        return not_checked(f"latents of {dim} dimension{'s' * (dim > 1)} have none to lose")
    latents = covariance_of(places(book.codebook, book.latents))
    held, limit = dimensions_that_hold(latents), max(1, dim // EACH)
    of_codes = participation_ratio(covariance_of(by_place(book.codebook).vectors[book.codes]))
    told = (
        f"{held} of {dim} dimensions hold 99% of the latents' variance; their effective dimension is "
        f"{participation_ratio(latents):.2g}, that of their codes {of_codes:.2g}"
    )
    return Finding("found" if 0 < held <= limit else "ok", float(held), float(limit), told)
