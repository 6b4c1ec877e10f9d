"""What to warn of in a file whose codebooks are about to change: stale EMA state, and tensors whose size follows K."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.models.registry import detected
from codebook_tools.models.stored_codes import followers

# Of convolutions and norms, K channels are chance; heads and embeddings over tokens are not.
_OVER_TOKENS = re.compile(
    r"head|logit|tok|emb|lm_|wte|prior|policy|actor|critic|classif|predict|out(put)?(?![a-z])|transformer|gpt|fc",
    re.IGNORECASE,
)


def stale_state(checkpoint: Checkpoint, books: Iterable[FoundCodebook]) -> list[str]:
    """Warnings of EMA sums that are not those of the codes. Raises CodebookError where a companion is not known."""
    stale = [one.key for book in books for place in book.places for one in followers(checkpoint, place) if one.stale]
    if not stale:
        return []
    more = f" and {len(stale) - 3} more" if len(stale) > 3 else ""
    return [f"the EMA state {', '.join(stale[:3])}{more} is stale: it is not that of the codes, and is written fresh"]


def dependents(checkpoint: Checkpoint, known: Collection[str]) -> list[str]:
    """Keys of tensors outside the codebooks with as many entries as there are codes, of one codebook or all of them,
    and up to 4 more. known: keys of a network that was built for the file, and what follows its codebooks."""
    elsewhere = detected(checkpoint).elsewhere
    return [key for key, shape in elsewhere if key not in known and len(shape) <= 2 and _OVER_TOKENS.search(key)]


def dependents_warning(checkpoint: Checkpoint, known: Collection[str], old: int, new: int) -> list[str]:
    """What to warn of where the number of codes changes and tensors may follow it."""
    keys = dependents(checkpoint, known) if old != new else []
    if not keys:
        return []
    few = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    return [f"{few} may follow the number of codes, and stays as it is for {old}: remap it, or train it anew for {new}"]
