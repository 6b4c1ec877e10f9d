"""`codebook compare`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..completion import rows
from ..options import DATA, FIGURES, FOLDER, LATENTS, LONG_RUN, MODEL, TRAIN, ModelArgument, command
from ..run import finetuning_of, named_after, request_of, run_and_show

if TYPE_CHECKING:  # imported where it is used: --help must not import torch
    from codebook_tools.runtime.progress import Watch
    from codebook_tools.workflows.comparison_rows import Comparison


@command(
    "Decide",
    "codebook compare model.safetensors --k 128 --data images/ --seeds 3",
    *(DATA, FIGURES, LATENTS, MODEL, TRAIN, FOLDER, LONG_RUN),
)
def compare(
    options: dict[str, Any],
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

        folder = options["output"] or named_after(model, ".compare")
        names = [name.strip() for name in strategies.split(",")] if strategies else []
        request = request_of(model, {**options, "output": None})
        return run_compare(request, k, names, finetuning_of(request, options), seeds=seeds, folder=folder, watch=watch)

    run_and_show(work, options)
