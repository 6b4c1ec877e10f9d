"""Codes that do not fit, and an alternative that explains them."""

from __future__ import annotations

from codebook_tools.diagnosis.evidence import AlternativeName, BookEvidence
from codebook_tools.diagnosis.finding import Finding, not_checked

NO_KMEANS = "codes searched by the dot product have no k-means to be compared with"


def explained_by(book: BookEvidence, name: AlternativeName, otherwise: Finding) -> Finding:
    """Found where the alternative of that name explains, better than any other, codes that do not fit.

    Args:
        book: The codebook.
        name: Of the alternative.
        otherwise: What to return where it does not.
    """
    if book.fit is None:
        return not_checked(NO_KMEANS)
    other = book.explanation
    if other is None or other.name != name:
        return otherwise
    return Finding("found", book.fit.misfit, 1.0, f"{book.fit.summary}; of {other.what}, {other.fit.ratio:.2g} times")
