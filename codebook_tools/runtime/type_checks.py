"""Checks untrusted settings against the types of the fields or parameters that they set."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from reprlib import repr as short
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from codebook_tools.errors import CodebookError

_SPELLED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "text"}


def kinds_of(made: object) -> dict[str, Any]:
    """The types of a dataclass's fields or a function's parameters, by name; none where they cannot be resolved."""
    try:
        return get_type_hints(made)
    except Exception:  # in third-party code, whose annotations may name what only type checkers import
        return {}


def fits(value: object, kind: Any) -> bool:
    """Whether a value from YAML or JSON is of a type, or converts to it. Any fits a type that neither can have."""
    if get_origin(kind) in (Union, UnionType):
        return any(fits(value, one) for one in get_args(kind))
    if get_origin(kind) is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(one, *get_args(kind)) for one in value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return value in [one.value for one in kind]
    if kind is int:
        return type(value) is int  # True is one to isinstance
    if kind is float and type(value) is int:
        return abs(value) <= sys.float_info.max
    if kind is Path:
        return isinstance(value, str)
    return isinstance(value, kind) if kind in (bool, float, str, NoneType) else True


def check_kind(name: str, value: object, kind: Any) -> None:
    """Check one value.

    Args:
        name: Of the setting, as the user wrote it.
        value: From YAML or JSON.
        kind: The type that it must fit.

    Raises:
        CodebookError: It does not.
    """
    if not fits(value, kind):
        raise CodebookError(f"{name} is {short(value)}; expected {_expected(kind)}")


def check_kinds(of: str, values: Mapping[str, object], kinds: Mapping[str, Any]) -> None:
    """As `check_kind` for each value whose name has a type. of: whose settings they are, for the message."""
    for name, value in values.items():
        check_kind(f"{of}: {name}", value, kinds.get(name, Any))


def _expected(kind: Any) -> str:
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_expected(one) for one in get_args(kind) if one is not NoneType)
    if get_origin(kind) is list:
        return f"a list, each {_expected(*get_args(kind))}"
    if kind in _SPELLED:
        return _SPELLED[kind]
    return f"one of {', '.join(get_args(kind) or [one.value for one in kind])}"
