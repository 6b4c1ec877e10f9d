"""A flag says that the codebook is not initialized: the model's code then overwrites it at its first forward pass."""

from __future__ import annotations

from codebook_tools.diagnosis.evidence import BookEvidence
from codebook_tools.diagnosis.finding import Finding, judged, not_checked


def uninitialized_flag(book: BookEvidence) -> Finding:
    """Found where any flag beside the codebook is not set."""
    flags = book.companions.flags
    if not flags:
        return not_checked("no such flag beside the codebook")
    unset = [key for key, value in flags.items() if not value]
    summary = f"{', '.join(unset or flags)}: {'not set' if unset else 'set'}"
    return Finding(judged(len(unset), 0), float(len(unset)), 0.0, summary)
