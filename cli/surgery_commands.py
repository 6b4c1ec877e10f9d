"""The surgeries, several in a row, and fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    DataOptions,
    Init,
    LatentsOption,
    LongRunOptions,
    MergeMethod,
    ModelArgument,
    ModelOptions,
    NoStepsTrainOptions,
    RestartMethod,
    ResultOptions,
    StatsOption,
    TrainOptions,
    WriteOptions,
    takes,
)
from .recipe_command import run_recipe
from .run import operate_on

if TYPE_CHECKING:  # imported where it is used: --help must not import torch
    from codebook_tools.codebook import Strategy
    from codebook_tools.runtime.progress import Watch

operations = typer.Typer()


@operations.command(
    epilog="Example: codebook refit model.safetensors --k 128 --data images/", rich_help_panel="Operate"
)
@takes(TrainOptions, DataOptions, ModelOptions, WriteOptions, LongRunOptions)
def refit(
    given: dict[str, Any],
    k: Annotated[int, typer.Option("--k", "-k", metavar="K", help="Codes of the new codebook.")],
    model: ModelArgument = None,
    init: Annotated[Init, typer.Option(help="Where k-means starts; used: at the codes in use.")] = Init.KMEANSPP,
    iterations: Annotated[int, typer.Option(metavar="N", help="At most so many Lloyd iterations.")] = 300,
    stats: StatsOption = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="k-means over all latents, not a million, of --latents or --latents-cache.")
    ] = False,
    latents: LatentsOption = None,
) -> None:
    """Re-Fit: a new codebook by k-means on the latents, then fine-tune with the original encoder and decoder."""

    def strategy(watch: Watch) -> Strategy:
        from codebook_tools.strategies import Refit

        return Refit(k=k, init=init.value, iterations=iterations, exact=exact, seed=given["seed"], watch=watch)

    operate_on("refit", model, strategy, {**given, "stats": stats, "latents": latents})


@operations.command(
    epilog="Example: codebook prune model.safetensors --threshold 0 --data images/", rich_help_panel="Operate"
)
@takes(NoStepsTrainOptions, DataOptions, ModelOptions, WriteOptions, LongRunOptions)
def prune(
    given: dict[str, Any],
    model: ModelArgument = None,
    threshold: Annotated[int, typer.Option(metavar="N", help="Drop codes that count N or fewer.")] = 0,
    keep: Annotated[int | None, typer.Option(metavar="K", help="Keep the K most used codes instead.")] = None,
    stats: StatsOption = None,
    latents: LatentsOption = None,
) -> None:
    """Drop the codes that are hardly used. Threshold 0 changes no reconstruction of what was counted."""

    def strategy(watch: Watch) -> Strategy:
        from codebook_tools.strategies import Prune

        return Prune(threshold=threshold, keep=keep)

    operate_on("prune", model, strategy, {**given, "stats": stats, "latents": latents})


@operations.command(
    epilog="Example: codebook quantize model.safetensors --k 128 --method pnn --data images/", rich_help_panel="Operate"
)
@takes(NoStepsTrainOptions, DataOptions, ModelOptions, WriteOptions, LongRunOptions)
def quantize(
    given: dict[str, Any],
    model: ModelArgument = None,
    k: Annotated[int | None, typer.Option("--k", "-k", metavar="K", help="Merge the codes into K.")] = None,
    method: Annotated[MergeMethod, typer.Option(help="How codes are merged.")] = MergeMethod.KMEANS,
    bits: Annotated[int | None, typer.Option(metavar="B", help="Round entries to B bits, 2 to 8, instead.")] = None,
    stats: StatsOption = None,
    latents: LatentsOption = None,
) -> None:
    """Merge codes that are alike, weighted by use, or round their entries to few bits. Latents are not looked at."""

    def strategy(watch: Watch) -> Strategy:
        from codebook_tools.strategies import Quantize

        return Quantize(k=k, method=method.value, bits=bits, seed=given["seed"])

    operate_on("quantize", model, strategy, {**given, "stats": stats, "latents": latents})


@operations.command(
    epilog="Example: codebook restart model.safetensors --method error --data images/ --steps 1000",
    rich_help_panel="Operate",
)
@takes(NoStepsTrainOptions, DataOptions, ModelOptions, WriteOptions, LongRunOptions)
def restart(
    given: dict[str, Any],
    model: ModelArgument = None,
    method: Annotated[
        RestartMethod,
        typer.Option(help="Where to: latents drawn by error or alike, used codes, or the nearest latent."),
    ] = RestartMethod.ERROR,
    threshold: Annotated[int, typer.Option(metavar="N", help="Move codes that count N or fewer.")] = 0,
    stats: StatsOption = None,
    latents: LatentsOption = None,
) -> None:
    """Move dead codes to where latents are. The codebook keeps its size, and codes in use stay as they are."""

    def strategy(watch: Watch) -> Strategy:
        from codebook_tools.strategies import Restart

        return Restart(method=method.value, threshold=threshold, seed=given["seed"])

    operate_on("restart", model, strategy, {**given, "stats": stats, "latents": latents})


@operations.command(
    epilog="Example: codebook grow model.safetensors --k 128 --data images/ --steps 1000", rich_help_panel="Operate"
)
@takes(NoStepsTrainOptions, DataOptions, ModelOptions, WriteOptions, LongRunOptions)
def grow(
    given: dict[str, Any],
    k: Annotated[int, typer.Option("--k", "-k", metavar="K", help="Codes of the new codebook: those in use or more.")],
    model: ModelArgument = None,
    stats: StatsOption = None,
    latents: LatentsOption = None,
) -> None:
    """Keep the codes in use, drop the dead ones, and place new ones where the error is, up to K."""

    def strategy(watch: Watch) -> Strategy:
        from codebook_tools.strategies import Grow

        return Grow(k=k, seed=given["seed"])

    operate_on("grow", model, strategy, {**given, "stats": stats, "latents": latents})


@operations.command(
    epilog="Example: codebook condense model.safetensors --k 128 --data images/", rich_help_panel="Operate"
)
@takes(TrainOptions, DataOptions, ModelOptions, WriteOptions, LongRunOptions)
def condense(
    given: dict[str, Any],
    k: Annotated[int, typer.Option("--k", "-k", metavar="K", help="Codes of the new codebook.")],
    model: ModelArgument = None,
    stats: StatsOption = None,
    latents: LatentsOption = None,
) -> None:
    """Fine-tune with up to four times as many codes, and merge them into K on the way."""

    def strategy(watch: Watch) -> Strategy:
        from codebook_tools.strategies import Condense

        return Condense(k=k, seed=given["seed"])

    operate_on("condense", model, strategy, {**given, "stats": stats, "latents": latents})


@operations.command(
    epilog="Example: codebook finetune model.safetensors --data images/ --steps 2000", rich_help_panel="Operate"
)
@takes(TrainOptions, DataOptions, ModelOptions, WriteOptions, LongRunOptions)
def finetune(given: dict[str, Any], model: ModelArgument = None) -> None:
    """Train on with the original encoder and decoder; the codebook keeps its size, and dead codes are revived."""
    operate_on("finetune", model, None, given)


@operations.command(epilog="Example: codebook run recipe.yaml --data images/", rich_help_panel="Operate")
@takes(DataOptions, ModelOptions, ResultOptions, LongRunOptions)
def run(
    given: dict[str, Any],
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file with a list of surgeries.")],
    model: ModelArgument = None,
) -> None:
    """Surgeries in a row, by a recipe, written as one. What is given here comes before what the recipe says."""
    run_recipe(context, recipe, model, given)
