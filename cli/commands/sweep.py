"""`codebook sweep`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import DATA, FIGURES, FOLDER, LATENTS, LONG_RUN, MODEL, EngineOption, ModelArgument, command
from ..run import named_after, numbers, request_of, run_and_show

if TYPE_CHECKING:  # imported where it is used: --help must not import torch
    from codebook_tools.runtime.progress import Watch
    from codebook_tools.workflows.sweep import Sweep


@command(
    "Decide",
    "codebook sweep model.safetensors --k 16,32,64,128,256 --data images/",
    DATA,
    FIGURES,
    LATENTS,
    MODEL,
    FOLDER,
    LONG_RUN,
)
def sweep(
    options: dict[str, Any],
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
    engine: EngineOption = "auto",
) -> None:
    """How many codes? Error, distortion and bits over K, right after each surgery, and a K that suffices."""
    sizes, prices = numbers(k, int), numbers(lambda_, float)

    def work(watch: Watch) -> Sweep:
        from codebook_tools.workflows.sweep import sweep as run_sweep

        folder = options["output"] or named_after(model, ".sweep")
        return run_sweep(request_of(model, {**options, "output": None}), sizes, prices, folder, watch, engine)

    run_and_show(work, options)
