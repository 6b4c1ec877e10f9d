"""The codes were made of latents that were flattened as they lie in memory, channels first."""

from __future__ import annotations

from codebook_tools.diagnosis.evidence import BookEvidence
from codebook_tools.diagnosis.explained_by import explained_by
from codebook_tools.diagnosis.finding import Finding, not_checked


def wrong_layout(book: BookEvidence) -> Finding:
    """Found where the codes fit latents that are flattened the wrong way, and not those that the model has."""
    own, cut = book.left, book.left_when_cut
    if cut is None:
        return not_checked("rows of files have no layout in memory; give --data")
    summary = f"the codes leave {own:.2g} of the latents' variance, {cut:.2g} where the channels are not moved last"
    return explained_by(book, "layout", Finding("ok", own / max(cut, 1e-30), 1.0, summary))
