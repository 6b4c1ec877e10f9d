"""A symptom: codes that no latent selects."""

from __future__ import annotations

from codebook_tools.diagnosis.evidence import BookEvidence
from codebook_tools.diagnosis.finding import Finding, judged
from codebook_tools.evaluation import metrics

DEAD, SOME = 0.5, 0.1
"""Shares of the codes that so many latents would use by chance: more than half of them dead is a collapse, more than a
tenth deserves a look."""


def dead_codes(book: BookEvidence) -> Finding:
    """Found where fewer than half of the codes are in use that as many latents would use if each drew one at random."""
    latents, size, used = int(book.counts.sum()), book.codebook.size, metrics.used(book.counts)
    by_chance = metrics.used_by_chance(latents, size)
    share = max(0.0, 1 - used / by_chance) if by_chance else 0.0
    summary = (
        f"{used} of {size} codes are in use by {latents:,} latents, which by chance would use {by_chance:.0f}; "
        f"perplexity {metrics.perplexity(book.counts):.1f}"
    )
    # Few latents use fewer codes than chance does, for codes are not alike often used.
    doubtful = SOME if book.counted and not book.filling else DEAD
    return Finding(judged(share, DEAD, doubtful), share, DEAD, summary)
