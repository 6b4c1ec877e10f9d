"""A command for each strategy: ours from their declarations, those of other distributions by `--set FIELD=VALUE`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codebook_tools.strategies import STRATEGIES

from ..operate import operate_on
from ..options import (
    COUNTS,
    DATA,
    FIGURES,
    LATENTS,
    LONG_RUN,
    MODEL,
    TRAIN,
    TRAIN_IF_ASKED,
    WRITE,
    ModelArgument,
    command,
    joined,
    parameters,
)

if TYPE_CHECKING:  # imported where it is used: --help must not import torch
    from codebook_tools.codebook import Strategy
    from codebook_tools.runtime.progress import Watch

_MODEL = inspect.Parameter("model", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=ModelArgument)


def surgeries() -> list[Callable[..., None]]:
    """The commands of our strategies, without the controls, which are rows of `compare` alone."""
    return [_command(name, strategy) for name, strategy in STRATEGIES.items() if hasattr(strategy, "summary")]


def _command(name: str, strategy: Any) -> Callable[..., None]:
    train = TRAIN if getattr(strategy, "trains", False) else TRAIN_IF_ASKED
    own = [_MODEL, *parameters(strategy)]
    shared = [*DATA, *FIGURES, *COUNTS, *LATENTS, *MODEL, *train, *WRITE, *LONG_RUN]
    by_the_run = {field.name for field in fields(strategy)} & {"seed", "watch"}

    def run(options: dict[str, Any], model: Any, **settings: Any) -> None:
        def make(watch: Watch) -> Strategy:
            offered = {"seed": options["seed"], "watch": watch}
            made: Strategy = strategy(**settings, **{field: offered[field] for field in by_the_run})
            return made

        operate_on(name, model, make, options)

    return joined(name, strategy.summary, "Operate", strategy.example, own, shared, run)


def added(name: str) -> Callable[..., None]:
    """The command of a strategy that another distribution adds; its class is loaded when the command runs."""

    @command("", "", DATA, FIGURES, MODEL, TRAIN_IF_ASKED, WRITE, LONG_RUN)
    def run(
        options: dict[str, Any],
        model: ModelArgument = None,
        set_: Annotated[
            list[str] | None,
            typer.Option("--set", metavar="FIELD=VALUE", help="A field of the strategy, as JSON or text. Repeatable."),
        ] = None,
    ) -> None:
        def strategy(watch: Watch) -> Strategy:
            from codebook_tools.strategies import make_strategy

            return make_strategy(name, set_ or [])

        operate_on(name, model, strategy, options)

    return run
