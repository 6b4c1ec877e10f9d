"""Tokens in lines of JSON, {"item": name, "codes": nested lists of integers}: read, and rewritten by an index map."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from codebook_tools.errors import CodebookError, one_line
from codebook_tools.remapping.token_ids import Translation
from codebook_tools.runtime.safe_io import parse_json

CODES, ITEM = "codes", "item"
"""The key of the tokens, and that of an item's name; of tensors and columns, too."""

_LONGEST = 64 << 20  # bytes of a line, which holds the tokens of one item
_AT_ONCE = 1 << 18  # ids that are translated together


def json_records(path: Path, key: str = CODES) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number, from 1, and object of each line that is not empty.

    Raises:
        CodebookError: A line is no object with that key.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        for number in count(1):
            line = file.readline(_LONGEST + 1)
            if not line:
                return
            if len(line) > _LONGEST:
                raise CodebookError(f"{path}: line {number} is longer than {_LONGEST:,} bytes")
            if not line.strip():
                continue
            try:
                record = parse_json(line)
            except ValueError as error:
                raise CodebookError(f"{path}: line {number} is no JSON: {one_line(error)}") from error
            if not isinstance(record, dict) or key not in record:
                raise CodebookError(f'{path}: line {number} is no {{"{ITEM}": name, "{key}": [...]}}')
            yield number, record


def json_line(record: dict[str, Any]) -> str:
    """One line, as short as JSON can be."""
    return json.dumps(record, separators=(",", ":")) + "\n"


def rewrite_lines(path: Path, translation: Translation, keys: Sequence[str], axis: int | None) -> Iterator[bytes]:
    """Translate the ids of a file of lines; empty lines go, other keys stay.

    Args:
        path: The file.
        translation: From old ids to new ones; it counts them.
        keys: Those that hold tokens; none for `codes`.
        axis: Which axis runs over the codebooks: 0 is the line, 1 the position in its list, and so on. None for one
            codebook.

    Yields:
        The bytes of the new file, in order.

    Raises:
        CodebookError: A line holds no tokens, or an id that has no new one.
    """
    for key in keys or (CODES,):
        if axis is not None and axis < 1:
            raise CodebookError(f"{key} in {path} has no axis {axis} that runs over codebooks; count --axis from 0")
    records, ids, at = list[dict[str, Any]](), list[int](), list[tuple[int, tuple[int, ...]]]()

    def translated() -> bytes:
        stages = np.array([_stage(path, place, axis, len(translation.maps)) for _, place in at], dtype=np.int64)
        try:
            wide = np.array(ids, dtype=np.int64)
        except OverflowError as error:
            raise CodebookError(f"{path} holds an integer of more than 64 bits") from error
        where = lambda i: f"{path}, line {at[i][0]}, at {list(at[i][1])}"  # noqa: E731
        new = iter(translation(wide, stages, where).tolist())
        lines = [{name: _refilled(of, new) if name in chosen else of for name, of in one.items()} for one in records]
        return "".join(map(json_line, lines)).encode()

    chosen = [*(keys or (CODES,))]
    for number, record in json_records(path, chosen[0]):
        records.append(record)
        for name in (name for name in record if name in chosen):
            for place, value in _leaves(record[name], ()):
                if type(value) is not int:
                    raise CodebookError(f"{path}, line {number}: {name} holds {value!r}, and tokens are integers")
                ids.append(value)
                at.append((number, place))
        if len(ids) >= _AT_ONCE:
            yield translated()
            records, ids, at = [], [], []
    yield translated()


def _leaves(nested: Any, place: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Place and value of all that lies in nested lists, in order."""
    if not isinstance(nested, list):
        yield place, nested
        return
    for i, inner in enumerate(nested):
        yield from _leaves(inner, (*place, i))


def _refilled(nested: Any, values: Iterator[int]) -> Any:
    return [_refilled(inner, values) for inner in nested] if isinstance(nested, list) else next(values)


def _stage(path: Path, place: tuple[int, ...], axis: int | None, codebooks: int) -> int:
    if axis is None:
        return 0
    if axis > len(place):
        raise CodebookError(f"{path}: codes are nested {len(place) + 1} deep and have no axis {axis}")
    if place[axis - 1] >= codebooks:
        raise CodebookError(f"{path}: codes have more codebooks along axis {axis} than the map's {codebooks}")
    return place[axis - 1]
