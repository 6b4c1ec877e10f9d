"""The command line: the commands of the other files, and one for each strategy that another distribution adds."""

from __future__ import annotations

import inspect
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .commands.codes import codes
from .commands.compare import compare
from .commands.decode import decode
from .commands.diagnose import diagnose
from .commands.encode import encode
from .commands.finetune import finetune
from .commands.init import init
from .commands.inspect import inspect as inspect_
from .commands.map import map_
from .commands.measure import measure
from .commands.remap import remap
from .commands.run import run
from .commands.surgery import added, surgeries
from .commands.sweep import sweep
from .commands.verify import verify
from .config import ConfiguredCommand
from .errors import interruptible, one_voice, standard_streams

COMMANDS = (
    *(inspect_, init, measure, diagnose, codes, map_),
    *surgeries(),
    *(finetune, run, compare, sweep, verify, encode, decode, remap),
)
"""In the order of `codebook --help`."""


_OURS = {function.__name__.rstrip("_"): function for function in COMMANDS}
_CONTEXT = {"help_option_names": ["-h", "--help"]}


class Commands(TyperGroup):
    """Our commands, and one for each strategy that another distribution adds.

    The options of a command are made when it is run: those of all take a fifth of the time of `--help`.
    """

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.commands = {name: TyperCommand(name, **_listed(function)) for name, function in _OURS.items()}
        self.listing = False

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run, and let Ctrl-C end it before a command has begun, too."""
        with interruptible():
            return super().main(*args, **kwargs)

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of `--help`."""
        return [*self.commands, *sorted(_added_strategies())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a name, or None; without its options while all are listed."""
        if cmd_name in _OURS:
            return self.commands[cmd_name] if self.listing else _made(_OURS[cmd_name], **_listed(_OURS[cmd_name]))
        text = f"The strategy {cmd_name}, which another installed distribution adds."
        return _made(added(cmd_name), help=text) if cmd_name in _added_strategies() else None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, which lists all commands."""
        self.listing = True
        super().format_help(ctx, formatter)


def _listed(function: Any) -> dict[str, Any]:
    """What `--help` says of a command."""
    return {
        "help": inspect.cleandoc(function.__doc__),
        "rich_help_panel": function.heading,
        "epilog": f"Example: {function.example}",
    }


def _made(function: Any, **listed: Any) -> Any:
    typed = typer.Typer(
        rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False, context_settings=_CONTEXT
    )
    typed.command(cls=ConfiguredCommand, **listed)(function)
    return typer.main.get_command(typed)


app = typer.Typer(
    cls=Commands,
    help="Codebook surgery for pretrained VQ models: repair a collapsed codebook, and prove what it did.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings=_CONTEXT,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from codebook_tools.runtime.version import VERSION

        print(VERSION)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    pass


def _added_strategies() -> set[str]:
    return {point.name for point in entry_points(group="codebook_tools.strategies")}


def main() -> None:
    """The console script."""
    with standard_streams(), one_voice():
        app()


if __name__ == "__main__":
    main()
