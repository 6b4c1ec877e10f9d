"""`codebook.toml`: options that need not be typed in a folder that has one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from codebook_tools.errors import CodebookError, one_line
from codebook_tools.runtime.options import Declared, declared
from codebook_tools.training.recipe import FineTune
from codebook_tools.workflows.request import Request

from .errors import reported

NAME = "codebook.toml"
_EACH_TIME = ("output", "force", "resume", "push_to_hub", "private")
"""Options of a single run, which no file may set."""


def keys() -> dict[str, Declared]:
    """The options that the file may set, by key: their names on the command line without dashes before them."""
    options = {**declared(Request), **declared(FineTune)}
    return {typed_as(one).removeprefix("--"): one for name, one in options.items() if name not in _EACH_TIME}


def typed_as(one: Declared) -> str:
    """The name of an option on the command line."""
    return one.option.names[0] if one.option.names else f"--{one.name.replace('_', '-')}"


class ConfiguredCommand(TyperCommand):
    """A command whose options have their defaults from the file in the current folder, where a MODEL is typed.

    The file beside a MODEL elsewhere is not read: it may come from whoever made the model, and `network` runs code.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse twice: for MODEL and --no-config, then with the defaults of the file."""
        if ctx.resilient_parsing:  # of a shell's completion
            return super().parse_args(ctx, args)
        ctx.resilient_parsing = True  # nothing is required, and no help is printed
        super().parse_args(ctx, [*args])
        typed, ctx.params, ctx.resilient_parsing = ctx.params, {}, False
        model = typed.get("model")
        defaults = dict[str, Any]()
        if model is not None and typed.get("no_config") is False:
            with reported():
                defaults = _defaults(Path(NAME), typed)
            ctx.meta["notes"] = (*_others(Path(model)),)
        ctx.default_map = defaults
        rest = super().parse_args(ctx, args)
        ctx.meta["config"] = {
            name.replace("_", "-"): defaults[name] for name in defaults if source_of(ctx, name) == "DEFAULT_MAP"
        }
        return rest


def source_of(context: Any, name: str) -> str:
    """Where a command has the value of an option from: "COMMANDLINE", "DEFAULT_MAP" (the file), "DEFAULT" …"""
    source = context.get_parameter_source(name)
    return "" if source is None else str(source.name)


def _others(model: Path) -> Iterator[str]:
    """A remark on a file beside the model that is not the one in the current folder."""
    beside = (model if model.is_dir() else model.parent) / NAME
    if beside.is_file() and beside.resolve() != Path(NAME).resolve():
        yield f"{beside} is not read: only {NAME} in the current folder is; copy it here if it is yours"


def _defaults(path: Path, typed: Mapping[str, Any]) -> dict[str, Any]:
    """What the file sets of a command's options, by parameter; nothing where there is no file.

    Args:
        path: Of the file.
        typed: All parameters of the command, with what was typed. Latents and counts stand in place of data.

    Raises:
        CodebookError: It cannot be read, or has a key that is no option.
    """
    if not path.is_file():
        return {}
    import tomllib  # these take longer to import than --help may
    from difflib import get_close_matches

    from codebook_tools.runtime.safe_io import read_text

    try:
        content = tomllib.loads(read_text(path))
    except (tomllib.TOMLDecodeError, ValueError) as error:
        raise CodebookError(f"{path} is no TOML: {one_line(error)}") from error
    known = keys()
    for key in content:
        if key not in known:
            near = get_close_matches(key, known, 1)
            way_out = f"is it {near[0]}?" if near else f"it may have {', '.join(sorted(known))}"
            raise CodebookError(f"{path}: no key {key}; {way_out}")
    of = {known[key].name: _value(path, key, known[key], value) for key, value in content.items()}
    instead = ("data", "test_data", "metrics") if any(typed.get(name) for name in ("latents", "stats", "merge")) else ()
    return {name: value for name, value in of.items() if name in typed and name not in instead}


def _value(path: Path, key: str, one: Declared, value: Any) -> Any:
    """As it would be typed.

    Raises:
        CodebookError: It is not what the option takes.
    """
    entries = value if isinstance(value, list) else [value]
    if any(isinstance(entry, dict | list) for entry in entries) or (one.kind is bool) != isinstance(value, bool):
        raise CodebookError(f"{path}: {key} = {value!r} is not what {typed_as(one)} takes")
    if one.kind is bool:
        return value
    texts = [str(entry) for entry in entries]
    return texts if one.repeated else ",".join(texts)


def as_toml(options: Mapping[str, Any]) -> str:
    """The content of a file that sets options, by key: texts, numbers, booleans and lists of them."""
    lines = [f"{key} = {_toml(value)}" for key, value in options.items()]
    head = "# Read by `codebook` in this folder where a MODEL is typed. A typed option takes its key's place.\n"
    return head + "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    return '"' + str(value).translate(_ESCAPES) + '"'


_ESCAPES = {ord('"'): '\\"', ord("\\"): "\\\\", **{n: f"\\u{n:04x}" for n in (*range(32), 127)}}
