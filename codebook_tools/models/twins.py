"""Codebooks that a file has under several names, recognized by their bytes; no tensor is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.errors import few_of
from codebook_tools.models.evidence import flags


def twins(checkpoint: Checkpoint, book: FoundCodebook, books: Sequence[FoundCodebook]) -> tuple[FoundCodebook, ...]:
    """The other codebooks that are equal to one bit by bit, and so taken for the same tensor.

    There are none where all of its numbers are equal, or it is not initialized yet: then others equal it by chance.

    Args:
        checkpoint: The file.
        book: The codebook.
        books: Candidates, which may contain it.

    Returns:
        The equal ones, with its axis, size and dim.
    """
    entry = checkpoint.entries[book.key]
    alike = [
        other
        for other in books
        if other.key != book.key
        and (checkpoint.entries[other.key].shape, checkpoint.entries[other.key].dtype) == (entry.shape, entry.dtype)
        and _equal(checkpoint, book.key, other.key)
    ]
    if not alike or _is_constant(checkpoint, book.key) or _is_unset(checkpoint, book.key):
        return ()
    return tuple(replace(other, axis=book.axis, size=book.size, dim=book.dim) for other in alike)


def twin_groups(checkpoint: Checkpoint, books: Sequence[FoundCodebook]) -> list[tuple[FoundCodebook, ...]]:
    """Groups of codebooks that are one under several names."""
    groups, taken = list[tuple[FoundCodebook, ...]](), set[str]()
    for book in books:
        if book.key not in taken and (others := twins(checkpoint, book, books)):
            groups.append((book, *others))
            taken |= {place.key for place in groups[-1]}
    return groups


def twin_warning(places: Sequence[FoundCodebook], why: str) -> str:
    """The warning of one codebook under several names; `why` follows its names."""
    few = few_of([place.key for place in places])
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
