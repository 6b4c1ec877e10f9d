"""Latents that vary in next to no direction: an encoder that makes such ones gives a codebook nothing to tell apart."""

from __future__ import annotations

import torch

from codebook_tools.clustering.metric import prepared
from codebook_tools.diagnosis.checks.dead_codes import dead_codes
from codebook_tools.diagnosis.evidence import BookEvidence, Evidence
from codebook_tools.diagnosis.finding import Finding, not_checked
from codebook_tools.evaluation import metrics

REST = 1e-3
"""Share of the variance outside of the first directions: where latents are good for their data it is 0.01 and more."""

EACH = 32
"""Dimensions of a latent, for each of which there is a first direction, and one at least."""

POOR = 0.5
"""Of the error of items without detail: a model that reconstructs worse has lost what the latents were to hold."""

_LEAST = 3  # dimensions, of which fewer have nothing to lose


def dimensional_collapse(evidence: Evidence, book: BookEvidence) -> Finding:
    """Found where nearly all variance of the latents lies in very few dimensions, and codes or reconstructions suffer.

    Suspicious where they do not suffer, for data may be so simple.
    """
    dim = book.codebook.dim
    if dim < _LEAST:
        return not_checked(f"latents of {dim} dimension{'s' * (dim > 1)} have none to lose")
    latents = metrics.covariance_of(book.codebook.metric.prepare(book.latents))
    codes = metrics.covariance_of(prepared(book.codebook).vectors[book.codes])
    variances = torch.linalg.eigvalsh(latents).flip(0).clamp(min=0)
    rest = float(variances[max(1, dim // EACH) :].sum() / variances.sum().clamp(min=1e-300))
    summary = (
        f"{metrics.dimensions_that_hold(latents)} of {dim} dimensions hold 99% of the latents' variance; effective "
        f"dimension {metrics.participation_ratio(latents):.2g}, of their codes "
        f"{metrics.participation_ratio(codes):.2g}"
    )
    if rest >= REST or not bool(variances.any()):
        return Finding("ok", rest, REST, summary)
    suffers = dead_codes(book).verdict == "found" or evidence.worse_than_flat(POOR)
    return Finding("found" if suffers else "suspicious", rest, REST, summary)
