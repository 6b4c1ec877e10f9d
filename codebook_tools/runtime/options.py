"""How a field of a settings dataclass is typed on the command line, declared at the field itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Option:
    """The option of a field: `steps: Annotated[int, Option("Steps, 0 for none.", metavar="N")] = 1000`.

    Attributes:
        help: A sentence for `--help`.
        metavar: What stands for the value there; None for the name of its type or its choices.
        names: As typed; none for `--` and the field's name.
        panel: The heading in `--help` that it stands under; None for the command's own options.
        choices: The only values that a text may have; none for any.
        parse: From the text that is typed to the value. Raises CodebookError for other texts.
    """

    help: str
    metavar: str | None = None
    names: tuple[str, ...] = ()
    panel: str | None = None
    choices: tuple[str, ...] = ()
    parse: Callable[[str], Any] | None = None


@dataclass(frozen=True)
class Declared:
    """A field that is an option.

    Attributes:
        name: Of the field.
        kind: The type of one value as it is typed: bool, int, float, str, Path or a Literal.
        repeated: Whether it may be typed several times; the field is a tuple then.
        default: Of the field; dataclasses.MISSING where it has none.
        option: How it is typed.
    """

    name: str
    kind: Any
    repeated: bool
    default: Any
    option: Option


@cache
def declared(settings: type) -> dict[str, Declared]:
    """The fields of a dataclass that are options, by name, in the order of the fields."""
    hints = get_type_hints(settings, include_extras=True)
    options = dict[str, Declared]()
    for field in fields(settings):
        if get_origin(hints[field.name]) is Annotated:
            kind, option = get_args(hints[field.name])
            options[field.name] = Declared(field.name, *_typed(kind, option), field.default, option)
    return options


def _typed(kind: Any, option: Option) -> tuple[Any, bool]:
    """The type of one value, and whether the option may be repeated."""
    if get_origin(kind) in (Union, UnionType):
        kind = next(one for one in get_args(kind) if one is not NoneType)
    repeated = get_origin(kind) is tuple and option.parse is None
    if option.choices:
        kind = Literal[option.choices]
    elif option.parse or repeated or kind is Any:
        kind = str
    return kind, repeated


def values(settings: type, typed: Mapping[str, Any]) -> dict[str, Any]:
    """Convert what was typed to values of a dataclass's fields.

    Args:
        settings: The dataclass.
        typed: Values by name of the field; names that are no options of it are ignored.

    Returns:
        Values by name, without the fields that `typed` lacks.

    Raises:
        CodebookError: A text is not what its option expects.
    """
    converted = dict[str, Any]()
    for name, one in declared(settings).items():
        if name in typed:
            value = typed[name]
            if one.repeated:
                value = tuple(value or ())
            elif one.option.parse and isinstance(value, str):
                value = one.option.parse(value)
            converted[name] = value
    return converted
