"""Codes that do not fit, and what else they are of: the same look for every rival."""

from __future__ import annotations

from codebook_tools.diagnosis.evidence import BookEvidence, RivalName
from codebook_tools.diagnosis.finding import Finding, not_checked

NO_KMEANS = "codes searched by the dot product have no k-means to be held against"


def explained_by(book: BookEvidence, name: RivalName, otherwise: Finding) -> Finding:
    """Found where a rival of that name explains, better than any other, codes that do not fit; else what is measured of
    that rival alone."""
    if book.fit is None:
        return not_checked(NO_KMEANS)
    rival = book.explanation
    if rival is None or rival.name != name:
        return otherwise
    return Finding("found", book.fit.misfit, 1.0, f"{book.fit.summary}; of {rival.what}, {rival.fit.ratio:.2g} times")
