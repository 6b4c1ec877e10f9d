"""A model's config: a JSON object, read with suspicion and changed in one entry alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

from codebook_tools.errors import CodebookError

Config = dict[str, object]


def parse_config(path: Path) -> Config:
    """The object in a config file. Raises CodebookError where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise CodebookError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CodebookError(f"{path} is no JSON: {error}; restore it from where the model came from") from error
    if not isinstance(found, dict):
        raise CodebookError(f"{path} holds a JSON {type(found).__name__}; a config is an object of named entries")
    return found


def with_entry(text: bytes, key: str, value: int) -> bytes:
    """The config `text` with a top-level entry set, everything else as it was; a number is replaced where it stands."""
    old = json.loads(text)
    if key in old and old[key] == value:
        return text
    new = {**old, key: value}
    pattern = rb'("%s"\s*:\s*)\d+' % re.escape(json.dumps(key)[1:-1].encode())
    edited = re.sub(pattern, lambda found: found[1] + str(value).encode(), text)
    if key in old and same_config(json.loads(edited), new):
        return edited
    return (json.dumps(new, indent=2) + "\n").encode()


def same_config(a: object, b: object) -> bool:
    """Equal, order of entries included: as text, for NaN is unlike itself and True is like 1."""
    return json.dumps(a) == json.dumps(b)
