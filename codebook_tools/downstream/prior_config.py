"""A prior's configs after a surgery: sizes of vocabulary and codebook, and the ids of special tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codebook_tools.checkpoints.config import parse_config, with_entries

VOCABULARY = re.compile(r"(\w+_)?(n_)?vocab(ulary)?(_size)?|num_tokens")
CODEBOOK = re.compile(r"(\w+_)?codebook_size|(\w+_)?codebook_entries|num_(vq_)?embeddings|(num|n)_codes")
"""Not n_embed: to some it is the number of codes, to others the width."""
SPECIAL = re.compile(r"(\w+_)?token_(ids?|index)")


@dataclass(frozen=True)
class Change:
    """vocabulary, codebook: size before and after. new_id: of an id of the old vocabulary."""

    vocabulary: tuple[int, int]
    codebook: tuple[int, int]
    new_id: Callable[[int], int]


def followed(path: Path, change: Change) -> bytes:
    """The text of a config with the entries that depend on the vocabulary as the change makes them, all else as it was.

    Raises CodebookError where it is no config.
    """
    text = path.read_bytes()
    for key, value in parse_config(path).items():
        new = _followed(key, value, change)
        if new != value:
            text = with_entries(text, {key: new})
    return text


def _followed(key: str, value: Any, change: Change) -> Any:
    if isinstance(value, dict):
        return {inner: _followed(inner, old, change) for inner, old in value.items()}
    if isinstance(value, list):
        return [_followed(key, old, change) for old in value]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    for names, sizes in ((VOCABULARY, (change.vocabulary, change.codebook)), (CODEBOOK, (change.codebook,))):
        if names.fullmatch(key):
            return next((after for before, after in sizes if value == before), value)
    if SPECIAL.fullmatch(key) and 0 <= value < change.vocabulary[0]:
        return change.new_id(value)
    return value
