"""A symptom: codes that no latent selects."""

from __future__ import annotations

from codebook_tools import metrics
from codebook_tools.diagnosis.check import Finding, judged, not_checked
from codebook_tools.diagnosis.evidence import BookEvidence

DEAD, SOME = 0.5, 0.1
"""Shares of the codes: more than half dead is a collapse, more than a tenth deserves a look."""


def dead_codes(book: BookEvidence) -> Finding:
    """Found where more than half have no hit on the calibration data."""
    if not book.counted:
        return not_checked(
            f"{int(book.counts.sum())} latents are too few for {book.codebook.size} codes: give more --data"
        )
    share, used = 1 - metrics.usage(book.counts), metrics.used(book.counts)
    told = f"{used} of {book.codebook.size} codes in use, perplexity {metrics.perplexity(book.counts):.1f}"
    return Finding(judged(share, DEAD, DEAD if book.filling else SOME), share, DEAD, told)
