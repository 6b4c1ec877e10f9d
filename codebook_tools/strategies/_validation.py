"""What the settings of several strategies must fulfil."""

from __future__ import annotations

from codebook_tools.errors import CodebookError


def check_k(k: int) -> None:
    """Raise CodebookError where a codebook of k codes cannot be."""
    if k < 1:
        raise CodebookError(f"k={k} is below 1; use --k 1 or more")


def check_threshold(threshold: int) -> None:
    """Raise CodebookError where no code can count so many."""
    if threshold < 0:
        raise CodebookError(f"threshold={threshold} is below 0, the count of a dead code; use --threshold 0")
    if threshold >= 2**63:
        raise CodebookError(f"threshold={threshold} is more than can be counted, {2**63 - 1}")
