"""Data that have few modes: as many codes as there are modes say all, and more only split noise."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from codebook_tools.diagnosis.evidence import BookEvidence, Evidence
from codebook_tools.diagnosis.finding import Finding, judged, not_checked, of_each_book, worst
from codebook_tools.evaluation.metrics import effective_dimension

DROP = 8.0
"""Times that twice as many centroids leave less: in one dimension it is 4, in more it is less, between modes more."""

MOSTLY = 0.5
"""Of the codebook's size: with fewer distinct latents, or modes, codes must be left over."""

_LEAST = 2  # points of a curve


def few_modes(evidence: Evidence) -> Finding:
    """Found where items, or latents, hardly differ but for a few kinds of them.

    Few are distinct, or the curve of distortion over centroids breaks off at few of them; for latents far below K.
    """
    return worst([of_each_book(_of_latents)(evidence), _of_items(evidence)])


def _of_items(evidence: Evidence) -> Finding:
    if len(evidence.curve) < _LEAST:
        return not_checked(evidence.unseen or "too few items to tell kinds of them; give more --data")
    modes, drop = _steepest(evidence.curve)
    summary = f"from {modes} to {2 * modes} kinds of items, what they leave falls {drop:.2g} times"
    return Finding(judged(drop, DROP), drop, DROP, summary)


def _of_latents(book: BookEvidence) -> Finding:
    size = book.codebook.size
    if book.distinct <= MOSTLY * size:
        summary = f"{book.distinct} distinct latents for {size} codes"
        return Finding("found", float(book.distinct), MOSTLY * size, summary)
    curve = {k: left for k, left in book.curve.items() if k <= MOSTLY * size}
    if len(curve) < _LEAST:
        return not_checked(f"{size} codes are too few to leave some over")
    modes, drop = _steepest(curve)
    summary = f"from {modes} to {2 * modes} centroids the error falls {drop:.2g} times"
    dimension = effective_dimension(book.curve)
    return Finding(
        judged(drop, DROP), drop, DROP, f"{summary}; by the rate of that, latents of {dimension:.2g} dimensions"
    )


def _steepest(curve: Mapping[int, float]) -> tuple[int, float]:
    """Where twice as many centroids leave the least of what there was, and how many times less."""
    steps = [(k, left / max(less, 1e-30)) for (k, left), (_, less) in pairwise(curve.items())]
    return max(steps, key=lambda step: step[1])
