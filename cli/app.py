"""The command line: the commands of the other files, and one for each strategy that another distribution adds."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .commands.codes import codes
from .commands.compare import compare
from .commands.diagnose import diagnose
from .commands.finetune import finetune
from .commands.init import init
from .commands.inspect import inspect
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
    *(inspect, init, measure, diagnose, codes, map_),
    *surgeries(),
    *(finetune, run, compare, sweep, verify, remap),
)
"""In the order of `codebook --help`."""


class Commands(TyperGroup):
    """Our commands, and one for each strategy that another distribution adds."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run, and let Ctrl-C end it before a command has begun, too."""
        with interruptible():
            return super().main(*args, **kwargs)

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of `--help`."""
        return [*super().list_commands(ctx), *sorted(_added_strategies())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a name, or None."""
        ours = super().get_command(ctx, cmd_name)
        return _added_command(cmd_name) if ours is None and cmd_name in _added_strategies() else ours


app = typer.Typer(
    cls=Commands,
    help="Codebook surgery for pretrained VQ models: repair a collapsed codebook, and prove what it did.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
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


for _function in COMMANDS:
    app.command(
        _function.__name__,
        cls=ConfiguredCommand,
        rich_help_panel=_function.heading,  # type: ignore[attr-defined]
        epilog=f"Example: {_function.example}",  # type: ignore[attr-defined]
    )(_function)


def _added_strategies() -> set[str]:
    return {point.name for point in entry_points(group="codebook_tools.strategies")}


def _added_command(name: str) -> Any:
    typed = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)
    typed.command(name, cls=ConfiguredCommand, help=f"The strategy {name}, which another installed distribution adds.")(
        added(name)
    )
    return typer.main.get_command(typed)


def main() -> None:
    """The console script."""
    with standard_streams(), one_voice():
        app()


if __name__ == "__main__":
    main()
