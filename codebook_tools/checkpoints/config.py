"""A model's config: a JSON object, read with suspicion, changed in single entries, and its text else left as it is."""

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
    """The object in a config file. Raises CodebookError where there is none."""
    try:
        found = parse_json(read_bytes(path))
    except OSError as error:
        raise CodebookError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CodebookError(f"{path} is no JSON: {error}; restore it from where the model came from") from error
    if not isinstance(found, dict):
        raise CodebookError(f"{path} holds a JSON {type(found).__name__}; a config is an object of named entries")
    return found


def entry_of(config: Config, key: str) -> object | None:
    """The entry of a dotted key ("vq_config.num_embeddings"); None where there is none."""
    found: object = config
    for name in key.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def with_entries(text: bytes, entries: Mapping[str, object]) -> bytes:
    """The config `text` with entries set, by dotted key, and everything else of the text as it was.

    A value is replaced where it stands, a list of the same length number by number. Where a key is new, the whole is
    written anew. Raises CodebookError where a key leads through something that is no object.
    """
    encoding = json.detect_encoding(text)
    edited = text.decode(encoding, "surrogatepass")
    for key, value in entries.items():
        edited = _with_entry(edited, key.split("."), value)
    return edited.encode(encoding, "surrogatepass")


def same_config(a: object, b: object) -> bool:
    """Equal, order of entries included: as text, for NaN is unlike itself and True is like 1."""
    return json.dumps(a) == json.dumps(b)


def _with_entry(text: str, names: Sequence[str], value: object) -> str:
    start = _skip(text, 0)
    for name in names:
        found = {child: at for child, at in _children(text, start) if text[start] == "{"}.get(name)
        if found is None:
            return json.dumps(_merged(json.loads(text), names, value), indent=2) + "\n"
        start = found
    return _replaced(text, start, value)


def _replaced(text: str, start: int, value: object) -> str:
    """The text with the value that begins at `start` replaced, as little of it as can be."""
    old, end = _DECODER.raw_decode(text, start)
    if same_config(old, value):
        return text
    if isinstance(value, list) and isinstance(old, list) and len(old) == len(value):
        for (_, at), element in reversed(list(zip(_children(text, start), value, strict=True))):
            text = _replaced(text, at, element)  # from the last, so that the places of the others stay
        return text
    return text[:start] + json.dumps(value) + text[end:]


def _children(text: str, at: int) -> Iterator[tuple[str, int]]:
    """Name and start of every value of the object that begins at `at`; the names of a list's are empty.

    Of a name that stands there twice, the last counts, as for every reader of JSON.
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
    space = _SPACE.match(text, at)
    assert space
    return space.end()


def _merged(config: object, names: Sequence[str], value: object) -> object:
    if not names:
        return value
    if not isinstance(config, dict):
        raise CodebookError(
            f"the config has no place for {names[0]}: {json.dumps(config)[:40]} is no object of entries"
        )
    return {**config, names[0]: _merged(config.get(names[0], {} if names[1:] else None), names[1:], value)}
