"""Data that have few modes: as many codes as there are modes say all, and more only split noise."""

from __future__ import annotations

import math
from itertools import pairwise

from codebook_tools.diagnosis.check import Finding, judged
from codebook_tools.diagnosis.evidence import BookEvidence

DROP = 8.0
"""Times that twice as many centroids leave less: in one dimension it is 4, in more it is less, between modes more."""

MOSTLY = 0.5
"""Of the codebook's size: with fewer distinct latents, or modes, codes must be left over."""


def few_modes(book: BookEvidence) -> Finding:
    """Found where the latents hardly differ, or where the curve of distortion over codes breaks off far below K."""
    size = book.codebook.size
    if book.distinct <= MOSTLY * size:
        told = f"{book.distinct} distinct latents for {size} codes"
        return Finding("found", float(book.distinct), MOSTLY * size, told)
    steps = [
        (m, left / max(less, 1e-30)) for (m, left), (n, less) in pairwise(book.curve.items()) if n <= MOSTLY * size
    ]
    if not steps:
        return Finding("ok", None, None, f"{size} codes are too few to leave some over")
    modes, drop = max(steps, key=lambda step: step[1])
    told = f"effective dimension {effective_dimension(book):.2g}; from {modes} to {2 * modes} centroids the error falls"
    return Finding(judged(drop, DROP), drop, DROP, f"{told} {drop:.2g} times")


def effective_dimension(book: BookEvidence) -> float:
    """Of the latents, from the slope of log distortion over log K: at high rate that is -2 / dimension (Zador)."""
    (first, left), *_, (last, less) = book.curve.items()
    fall = math.log(max(left, 1e-30) / max(less, 1e-30))
    return 2 * math.log(last / first) / fall if fall > 0 else math.inf
