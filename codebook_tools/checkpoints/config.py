"""A model's config: a JSON object that is validated, and in which single entries change without touching other text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from codebook_tools.errors import CodebookError
from codebook_tools.runtime.safe_io import parse_json, read_bytes

Config = dict[str, object]

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


def parse_config(path: Path) -> Config:
    """Read the JSON object of a config file.

    Raises:
        CodebookError: The file cannot be read, is no JSON, or holds another JSON value than an object.
    """
    try:
        config = parse_json(read_bytes(path))
    except OSError as error:
        raise CodebookError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CodebookError(f"{path} is no JSON: {error}; restore it from where the model came from") from error
    if not isinstance(config, dict):
        raise CodebookError(f"{path} holds a JSON {type(config).__name__}; a config is an object of named entries")
    return config


def entry_of(config: Config, key: str) -> object | None:
    """The entry of a dotted key ("vq_config.num_embeddings"); None where there is none."""
    entry: object = config
    for name in key.split("."):
        entry = entry.get(name) if isinstance(entry, dict) else None
    return entry


def with_entries(text: bytes, entries: Mapping[str, object]) -> bytes:
    """Set entries of a config and leave all other text as it is.

    A value is replaced where it stands, a list of the same length element by element. Where a key is new, the whole
    config is formatted anew.

    Args:
        text: The JSON object in UTF-8, UTF-16 or UTF-32; the result has the same encoding.
        entries: Values by dotted key.

    Raises:
        CodebookError: A key leads through a value that is no object.
    """
    encoding = json.detect_encoding(text)
    edited = text.decode(encoding, "surrogatepass")
    for key, value in entries.items():
        edited = _with_entry(edited, key.split("."), value)
    return edited.encode(encoding, "surrogatepass")


def same_config(a: object, b: object) -> bool:
    """Whether two values are the same JSON, order of entries included.

    They are compared as text, since in Python NaN differs from itself and True equals 1.
    """
    return json.dumps(a) == json.dumps(b)


def _with_entry(text: str, names: Sequence[str], value: object) -> str:
    start = _skip(text, 0)
    for name in names:
        child = dict(_children(text, start)).get(name) if text[start] == "{" else None
        if child is None:
            return json.dumps(_merged(json.loads(text), names, value), indent=2) + "\n"
        start = child
    return _replaced(text, start, value)


def _replaced(text: str, start: int, value: object) -> str:
    """Replace the value that begins at `start`, and of a list of the same length only the elements that differ."""
    old, end = _DECODER.raw_decode(text, start)
    if same_config(old, value):
        return text
    if isinstance(value, list) and isinstance(old, list) and len(old) == len(value):
        for (_, at), element in reversed(list(zip(_children(text, start), value, strict=True))):
            text = _replaced(text, at, element)  # from the last, so that the offsets of the others stay
        return text
    return text[:start] + json.dumps(value) + text[end:]


def _children(text: str, at: int) -> Iterator[tuple[str, int]]:
    """Yield name and offset of each value of the object or list that begins at `at`; elements have empty names.

    A name that occurs twice is given twice; the last one counts, as for every reader of JSON.
    """
    named = text[at] == "{"
    if text[at] not in "{[":
        return
    at = _skip(text, at + 1)
    while text[at] not in "}]":
        name = ""
        if named:
            name, at = _DECODER.raw_decode(text, at)
            at = _skip(text, _skip(text, at) + 1)
        yield name, at
        _, at = _DECODER.raw_decode(text, at)
        at = _skip(text, at)
        at = _skip(text, at + 1) if text[at] == "," else at


def _skip(text: str, at: int) -> int:
    """The offset of what follows white space."""
    space = _SPACE.match(text, at)
    assert space
    return space.end()


def _merged(config: object, names: Sequence[str], value: object) -> object:
    """A copy of the config with the entry set, objects on the way made where they are missing."""
    if not names:
        return value
    if not isinstance(config, dict):
        raise CodebookError(
            f"the config has no place for {names[0]}: {json.dumps(config)[:40]} is no object of entries"
        )
    return {**config, names[0]: _merged(config.get(names[0], {} if names[1:] else None), names[1:], value)}
