"""Updates a prior's configs after a surgery: sizes of vocabulary and codebook, and the ids of special tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codebook_tools.checkpoints.config import Config, parse_config, with_entries

VOCABULARY = re.compile(r"(\w+_)?(n_)?vocab(ulary)?(_size)?|num_tokens")
CODEBOOK = re.compile(r"(\w+_)?codebook_size|(\w+_)?codebook_entries|num_(vq_)?embeddings|(num|n)_codes")
"""Without n_embed, which is the number of codes in some configs and the width in others."""
SPECIAL = re.compile(r"(\w+_)?token_(ids?|index)")


@dataclass(frozen=True)
class Change:
    """How a vocabulary changed.

    Attributes:
        vocabulary: Number of ids before and after.
        codebook: Number of codes before and after.
        new_id: Maps an id of the old vocabulary to the new one.
    """

    vocabulary: tuple[int, int]
    codebook: tuple[int, int]
    new_id: Callable[[int], int]


def followed(path: Path, change: Change, main: Path | None = None) -> bytes:
    """Update the entries of a config that depend on the vocabulary; all other text stays.

    Args:
        path: The config.
        change: How the vocabulary changed.
        main: The main config of the model, which tells whose vocabulary `path` is about; None for `path` itself.

    Returns:
        The new text.

    Raises:
        CodebookError: A file is no config.
    """
    ours = _is_ours(parse_config(main or path), change)
    return with_entries(path.read_bytes(), dict(_changes(parse_config(path), change, ours is not False, "")))


def _is_ours(config: Config, change: Change) -> bool | None:
    """Whether some level of the config names the vocabulary that changed; None where none names any."""
    levels = [_names_ours(level, change) for level in _levels(config)]
    return None if all(level is None for level in levels) else any(levels)


def _levels(config: Config) -> Iterator[Config]:
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _levels(value)


def _names_ours(level: Config, change: Change) -> bool | None:
    """Whether a vocabulary size at this level is that of the changed one; None without any size."""
    sizes = [value for key, value in level.items() if VOCABULARY.fullmatch(key) and type(value) is int]
    return any(size in (change.vocabulary[0], change.codebook[0]) for size in sizes) if sizes else None


def _changes(config: Config, change: Change, ours: bool, at: str) -> Iterator[tuple[str, object]]:
    """Dotted key and new value of every entry that changes. ours: whether ids at this level belong to the changed
    vocabulary; a model with several has the ids of each at one level with its size."""
    named = _names_ours(config, change)
    ours = ours if named is None else named
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _changes(value, change, ours, f"{at}{key}.")
        elif (new := _followed(key, value, change, ours)) != value:
            yield f"{at}{key}", new


def _followed(key: str, value: Any, change: Change, ours: bool) -> Any:
    if isinstance(value, list):
        return [_followed(key, old, change, ours) for old in value]
    if type(value) is not int:
        return value
    for names, sizes in ((VOCABULARY, (change.vocabulary, change.codebook)), (CODEBOOK, (change.codebook,))):
        if names.fullmatch(key):
            return next((after for before, after in sizes if value == before), value)
    return change.new_id(value) if ours and SPECIAL.fullmatch(key) and 0 <= value < change.vocabulary[0] else value
