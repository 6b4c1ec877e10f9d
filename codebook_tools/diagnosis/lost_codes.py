"""How many codes a training lost, and whether it lost them by steps that were too long."""

from __future__ import annotations

from codebook_tools.diagnosis.evidence import BookEvidence, Evidence
from codebook_tools.diagnosis.initialization import born_dead
from codebook_tools.diagnosis.training_trace import WORSENED

LOST = 0.25
"""Share of the codes in use that fell out of it: what a surgery leaves in use and a good training keeps is more."""


def lost_since(book: BookEvidence) -> float:
    """Share of the codes that are dead, though the surgery or the original had them in use; 0 where that is unknown."""
    if book.pair is None or not book.counted or book.filling:
        return 0.0
    size = book.codebook.size
    never = int(born_dead(book.codebook.vectors, book.dead).sum())
    had = book.pair.used if book.pair.codebook.size == size else size - never
    return max(0.0, 1 - (size - int(book.dead.sum())) / max(had, 1))


def too_fast(evidence: Evidence) -> bool:
    """Whether the model reconstructs worse than the original, as after steps that were too long."""
    if evidence.mse is None or evidence.original_mse is None:
        return False
    return evidence.mse > WORSENED * evidence.original_mse
