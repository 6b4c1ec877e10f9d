"""Codebooks that stand in a file under several names, told from their bytes: no tensor is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.models.evidence import flags


def twins(checkpoint: Checkpoint, found: FoundCodebook, books: Sequence[FoundCodebook]) -> tuple[FoundCodebook, ...]:
    """Others of `books` that are equal to `found` bit by bit, and so taken for the same tensor.

    Not where all of its numbers are alike, or it is not initialized yet: then codebooks are equal by chance. Copies
    that an EMA keeps are no codebooks of their own.
    """
    entry = checkpoint.entries[found.key]
    alike = [
        book
        for book in books
        if book.key != found.key
        and (checkpoint.entries[book.key].shape, checkpoint.entries[book.key].dtype) == (entry.shape, entry.dtype)
        and _equal(checkpoint, found.key, book.key)
    ]
    if not alike or _is_constant(checkpoint, found.key) or _is_unset(checkpoint, found.key):
        return ()
    return tuple(replace(book, axis=found.axis, size=found.size, dim=found.dim) for book in alike)


def twin_groups(checkpoint: Checkpoint, books: Sequence[FoundCodebook]) -> list[tuple[FoundCodebook, ...]]:
    """Those that are one codebook under several names."""
    groups, taken = list[tuple[FoundCodebook, ...]](), set[str]()
    for book in books:
        if book.key not in taken and (others := twins(checkpoint, book, books)):
            groups.append((book, *others))
            taken |= {place.key for place in groups[-1]}
    return groups


def twin_warning(places: Sequence[FoundCodebook], why: str) -> str:
    """What is said of one codebook under several names."""
    names = [place.key for place in places]
    few = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{few} are one codebook{why}: it is operated on once, and written under each name"


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    return all(a == b for a, b in zip(checkpoint.chunks(one), checkpoint.chunks(other), strict=True))


def _is_constant(checkpoint: Checkpoint, key: str) -> bool:
    """Whether all of its numbers have the same bytes."""
    entry = checkpoint.entries[key]
    width = entry.nbytes // max(1, math.prod(entry.shape))
    first = next(checkpoint.chunks(key), b"")[:width]
    return all(chunk == first * (len(chunk) // max(1, width)) for chunk in checkpoint.chunks(key))


def _is_unset(checkpoint: Checkpoint, key: str) -> bool:
    """Whether a flag beside a codebook says that it is not initialized."""
    return any(not any(b"".join(checkpoint.chunks(flag))) for flag in flags(key, checkpoint.entries))
