"""Figures that disagree because they were counted over different data, or over too little."""

from __future__ import annotations

from codebook_tools.diagnosis.evidence import FEW_HITS, BookEvidence
from codebook_tools.diagnosis.finding import Finding, judged, not_checked
from codebook_tools.evaluation import metrics

APART = 2.0
"""Times that one perplexity is the other, at the same number of latents."""


def counting(book: BookEvidence) -> Finding:
    """Found where calibration and test data use the codes differently; not checked where either is too small."""
    few = min(int(book.counts.sum()), int(book.held_out.sum()))
    enough = FEW_HITS * min(book.codebook.size, metrics.used(book.counts))
    if few < enough:
        summary = f"{few} latents in the smaller of calibration and test data say little of {book.codebook.size} codes"
        return not_checked(summary)
    ours, theirs = metrics.perplexity(book.counts), metrics.perplexity(book.held_out)
    times = max(ours, theirs) / max(min(ours, theirs), 1e-30)
    summary = f"perplexity {ours:.1f} on the calibration data, {theirs:.1f} on the test data"
    return Finding(judged(times, APART, APART**0.5), times, APART, summary)
