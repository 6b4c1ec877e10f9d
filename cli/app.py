"""The command line: the commands of the other files, and one for each strategy that another distribution adds."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .check_commands import followers
from .compare_commands import decisions
from .errors import interruptible, one_voice, standard_streams
from .inspect_commands import looks
from .options import DataOptions, LongRunOptions, ModelArgument, ModelOptions, NoStepsTrainOptions, WriteOptions, takes
from .run import operate_on
from .surgery_commands import operations

if TYPE_CHECKING:  # imported where it is used: --help must not import torch
    from codebook_tools.codebook import Strategy
    from codebook_tools.runtime.progress import Watch


class Commands(TyperGroup):
    """Our commands, and one for each strategy that another distribution adds."""

    def main(self, *given: Any, **more: Any) -> Any:
        with interruptible():  # before a command has begun, too
            return super().main(*given, **more)

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *sorted(_added_strategies())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
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


for _commands in (looks, operations, decisions, followers):
    app.add_typer(_commands)


def _added_strategies() -> set[str]:
    return {point.name for point in entry_points(group="codebook_tools.strategies")}


def _added_command(name: str) -> Any:
    added = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)

    @added.command(name, help=f"The strategy {name}, which another installed distribution adds.")
    @takes(NoStepsTrainOptions, DataOptions, ModelOptions, WriteOptions, LongRunOptions)
    def run(
        given: dict[str, Any],
        model: ModelArgument = None,
        set_: Annotated[
            list[str] | None,
            typer.Option("--set", metavar="FIELD=VALUE", help="A field of the strategy, as JSON or text. Repeatable."),
        ] = None,
    ) -> None:
        def strategy(watch: Watch) -> Strategy:
            from codebook_tools.strategies import make_strategy

            return make_strategy(name, set_ or [])

        operate_on(name, model, strategy, given)

    return typer.main.get_command(added)


def main() -> None:
    """The console script."""
    with standard_streams(), one_voice():
        app()


if __name__ == "__main__":
    main()
