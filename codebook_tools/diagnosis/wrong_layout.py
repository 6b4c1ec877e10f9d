"""The codes were made of latents that were flattened as they lie in memory, channels first."""

from __future__ import annotations

from codebook_tools.diagnosis.check import Finding
from codebook_tools.diagnosis.evidence import BookEvidence
from codebook_tools.diagnosis.explained import explained_by


def wrong_layout(book: BookEvidence) -> Finding:
    """Found where the codes fit latents that are cut the wrong way, and not those that the model sees."""
    return explained_by(book, "layout")
