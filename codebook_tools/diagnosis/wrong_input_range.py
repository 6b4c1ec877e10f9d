"""The codes were made of images in another range than the network was trained on."""

from __future__ import annotations

from codebook_tools.diagnosis.check import Finding, not_checked, of_each_book
from codebook_tools.diagnosis.evidence import Evidence
from codebook_tools.diagnosis.explained import explained_by


def wrong_input_range(evidence: Evidence) -> Finding:
    """Found where the codes fit the latents of images in another range than the network's own, and not in that."""
    if not evidence.ranges:
        return not_checked("sound is not mapped to a range")
    return of_each_book(lambda book: explained_by(book, "range"))(evidence)
