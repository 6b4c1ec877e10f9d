"""Checks and options that several strategies share."""

from __future__ import annotations

from typing import Annotated

from codebook_tools.codebook import Engine
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.options import Option

EngineOption = Annotated[Engine, Option("Which k-means runs; auto takes the native one.", panel="k-means")]


def check_k(k: int) -> None:
    """Raise CodebookError where k is no codebook size."""
    if k < 1:
        raise CodebookError(f"k={k} is below 1; use --k 1 or more")


def check_threshold(threshold: int) -> None:
    """Raise CodebookError where no code can have such a count."""
    if threshold < 0:
        raise CodebookError(f"threshold={threshold} is below 0, the count of a dead code; use --threshold 0")
    if threshold >= 2**63:
        raise CodebookError(f"threshold={threshold} is more than can be counted, {2**63 - 1}")
