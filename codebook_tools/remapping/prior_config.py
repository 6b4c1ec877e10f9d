"""A prior's configs after a surgery: sizes of vocabulary and codebook, and the ids of special tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codebook_tools.checkpoints.config import Config, parse_config, with_entries

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


def followed(path: Path, change: Change, main: Path | None = None) -> bytes:
    """The text of a config with the entries that depend on the vocabulary as the change makes them, all else as it was.

    main: the config of the model that `path` goes with, which says whose vocabulary it is about; None for that one
    itself. Raises CodebookError where one is no config.
    """
    ours = _is_ours(parse_config(main or path), change)
    return with_entries(path.read_bytes(), dict(_changes(parse_config(path), change, ours is not False, "")))


def _is_ours(config: Config, change: Change) -> bool | None:
    """Whether some level of the config names the vocabulary that changed; None where none names any."""
    told = [_names_ours(level, change) for level in _levels(config)]
    return None if all(one is None for one in told) else any(told)


def _levels(config: Config) -> Iterator[Config]:
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _levels(value)


def _names_ours(level: Config, change: Change) -> bool | None:
    sizes = [value for key, value in level.items() if VOCABULARY.fullmatch(key) and type(value) is int]
    return any(size in (change.vocabulary[0], change.codebook[0]) for size in sizes) if sizes else None


def _changes(config: Config, change: Change, ours: bool, at: str) -> Iterator[tuple[str, object]]:
    """Dotted key and new value of every entry that changes. ours: whether ids here are of the vocabulary that does: a
    model of several has them at levels of their own, beside the size of theirs."""
    told = _names_ours(config, change)
    ours = ours if told is None else told
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
