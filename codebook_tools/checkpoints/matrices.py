"""Tensors that may be a codebook whose name says nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from codebook_tools.checkpoints.read import Checkpoint

FEW = 5  # that a message names
FLOATS = ("F64", "F32", "F16", "BF16")


def matrices(checkpoint: Checkpoint) -> list[str]:
    """Keys of the matrices of floats that have no bias beside them, the largest first: what a codebook may be."""
    keys = [
        key
        for key, entry in checkpoint.entries.items()
        if len(entry.shape) == 2 and min(entry.shape) > 1 and entry.dtype in FLOATS
        and key.removesuffix("weight") + "bias" not in checkpoint.entries
    ]  # fmt: skip
    return sorted(keys, key=lambda key: -math.prod(checkpoint.shapes[key]))


def listed(keys: Sequence[str]) -> str:
    """The end of a sentence that asks for --codebook-key; empty without keys."""
    more = f" and {len(keys) - FEW} more" if len(keys) > FEW else ""
    return f"; matrices without a bias: {', '.join(keys[:FEW])}{more}" if keys else ""
