"""What the settings of several strategies must fulfil."""

from __future__ import annotations

from codebook_tools.errors import CodebookError


def check_k(k: int) -> None:
    """Raise CodebookError where a codebook of k codes cannot be."""
    if k < 1:
        raise CodebookError(f"k={k} is below 1; use --k 1 or more")
