"""Which tensor or column of a file holds the tokens: the only one of integers, or those that the user names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from codebook_tools.errors import CodebookError


def choose(path: Path, kind: str, keys: Sequence[str], integers: Mapping[str, bool]) -> set[str]:
    """Choose the tensors or columns that hold tokens.

    Args:
        path: The file, for messages.
        kind: "tensor" or "column", for messages.
        keys: Names that the user gives; none for the only one of integers.
        integers: By name, whether it holds integers.

    Returns:
        The names.

    Raises:
        CodebookError: A key does not hold integers, or without keys there is not exactly one that does.
    """
    for key in keys:
        if not integers.get(key, False):
            what = "holds no integers, which tokens are" if key in integers else "is not there"
            raise CodebookError(f"{path}: the {kind} {key} {what}; it has {', '.join(integers) or 'none'}")
    candidates = [key for key, is_integer in integers.items() if is_integer]
    if not keys and len(candidates) != 1:
        several = f"could be tokens in each of the {kind}s {', '.join(candidates)}"
        problem = several if candidates else f"has no {kind} of integers"
        raise CodebookError(f"{path} {problem}; name what holds them with --key")
    return set(keys or candidates)
