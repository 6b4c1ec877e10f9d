"""Which surgery, and how many codes: every one of them on one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .completion import rows
from .options import DataOptions, FolderOptions, LongRunOptions, ModelArgument, ModelOptions, TrainOptions, takes
from .run import named_after, numbers, recipe_of, request_of, run_and_show

if TYPE_CHECKING:  # imported where it is used: --help must not import torch
    from codebook_tools.runtime.progress import Watch
    from codebook_tools.workflows.comparison_rows import Comparison
    from codebook_tools.workflows.sweep import Sweep

decisions = typer.Typer()


@decisions.command(
    epilog="Example: codebook compare model.safetensors --k 128 --data images/ --seeds 3", rich_help_panel="Decide"
)
@takes(TrainOptions, DataOptions, ModelOptions, FolderOptions, LongRunOptions)
def compare(
    given: dict[str, Any],
    k: Annotated[int, typer.Option("--k", "-k", metavar="K", help="Codes, for the strategies that take a number.")],
    model: ModelArgument = None,
    strategies: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C",
            autocompletion=rows,
            help="Rows to run, such as untouched+same-recipe,prune,refit; an unknown one lists them. Left out: every "
            "strategy and the controls.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(metavar="N", help="Runs of each row, for mean and spread.")] = 1,
) -> None:
    """Every strategy and the controls, with the same data, batches and steps: one table. Goes on where it stopped."""

    def work(watch: Watch) -> Comparison:
        from codebook_tools.workflows.compare import compare as run_compare

        folder = given["output"] or named_after(model, ".compare")
        names = [name.strip() for name in strategies.split(",")] if strategies else []
        request = request_of(model, {**given, "output": None})
        return run_compare(request, k, names, recipe_of(request, given), seeds=seeds, folder=folder, watch=watch)

    run_and_show(work, given)


@decisions.command(
    epilog="Example: codebook sweep model.safetensors --k 16,32,64,128,256 --data images/", rich_help_panel="Decide"
)
@takes(DataOptions, ModelOptions, FolderOptions, LongRunOptions)
def sweep(
    given: dict[str, Any],
    model: ModelArgument = None,
    k: Annotated[str, typer.Option("--k", "-k", metavar="K,K,K", help="The sizes to try.")] = "16,32,64,128,256,512",
    lambda_: Annotated[
        str,
        typer.Option(
            "--lambda",
            metavar="L,L,L",
            help="Also Re-Fits that pay so much for a bit, in variances of the latents; 0.001,0.01 say.",
        ),
    ] = "",
) -> None:
    """How many codes? Error, distortion and bits over K, right after each surgery, and a K that suffices."""
    sizes, prices = numbers(k, int), numbers(lambda_, float)

    def work(watch: Watch) -> Sweep:
        from codebook_tools.workflows.sweep import sweep as run_sweep

        folder = given["output"] or named_after(model, ".sweep")
        request = request_of(model, {**given, "output": None})
        return run_sweep(request, sizes, prices, folder, watch)

    run_and_show(work, given)
