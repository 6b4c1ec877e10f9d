"""Warnings before codebooks change: stale EMA state, and tensors whose size may depend on K."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.errors import few_of
from codebook_tools.models.registry import detected
from codebook_tools.models.stored_codes import followers

# Of convolutions and norms, K channels are chance; heads and embeddings over tokens are not.
_OVER_TOKENS = re.compile(
    r"head|logit|tok|emb|lm_|wte|prior|policy|actor|critic|classif|predict|out(put)?(?![a-z])|transformer|gpt|fc",
    re.IGNORECASE,
)


def stale_state(checkpoint: Checkpoint, books: Iterable[FoundCodebook]) -> list[str]:
    """Warnings of EMA sums that are not those of the codes. Raises CodebookError for a companion of unknown role."""
    stale = [one.key for book in books for place in book.places for one in followers(checkpoint, place) if one.stale]
    if not stale:
        return []
    return [f"the EMA state {few_of(stale)} is stale: it is not that of the codes, and is written fresh"]


def dependents(checkpoint: Checkpoint, known: Collection[str]) -> list[str]:
    """Keys of tensors whose size may depend on K: token heads, embeddings and the like.

    They have as many entries as one codebook, or all of them, has codes, or up to 4 more.

    Args:
        checkpoint: The file.
        known: Keys to leave out: of a network that was built for the file, and of its codebooks.
    """
    elsewhere = detected(checkpoint).elsewhere
    return [key for key, shape in elsewhere if key not in known and len(shape) <= 2 and _OVER_TOKENS.search(key)]


def dependents_warning(checkpoint: Checkpoint, known: Collection[str], old: int, new: int) -> list[str]:
    """A warning of `dependents` where the number of codes changes from `old` to `new`; else none."""
    keys = dependents(checkpoint, known) if old != new else []
    if not keys:
        return []
    few = few_of(keys)
    return [f"{few} may follow the number of codes, and stays as it is for {old}: remap it, or train it anew for {new}"]
