"""Which of the things in a file holds the tokens: the only one that could, or those that the user names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from codebook_tools.errors import CodebookError


def choose(path: Path, kind: str, keys: Sequence[str], integers: Mapping[str, bool]) -> set[str]:
    """integers: whether each thing of this kind holds integers. Raises CodebookError where it is not plain which."""
    for key in keys:
        if not integers.get(key, False):
            what = "holds no integers, which tokens are" if key in integers else "is not there"
            raise CodebookError(f"{path}: the {kind} {key} {what}; it has {', '.join(integers) or 'none'}")
    found = [key for key, could in integers.items() if could]
    if not keys and len(found) != 1:
        several = (
            f"could be tokens in each of the {kind}s {', '.join(found)}" if found else f"has no {kind} of integers"
        )
        raise CodebookError(f"{path} {several}; name what holds them with --key")
    return set(keys or found)
