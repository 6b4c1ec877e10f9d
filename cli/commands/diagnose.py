"""`codebook diagnose`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import DATA, LATENTS, MODEL, RUN, ModelArgument, command
from ..run import request_of, run_and_show

if TYPE_CHECKING:  # imported where it is used: --help must not import torch
    from codebook_tools.runtime.progress import Watch
    from codebook_tools.workflows.diagnose import Diagnosis


@command(
    "Look",
    "codebook diagnose model.refit-k128.safetensors --against model.safetensors --data images/",
    *(DATA, LATENTS, MODEL, RUN),
)
def diagnose(
    options: dict[str, Any],
    model: ModelArgument = None,
    against: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="The original, before the surgery or the training.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What `refit --json` or `finetune --json` wrote of its training."),
    ] = None,
) -> None:
    """Why a codebook collapsed: cause by cause, with the number that says so. Exit code 3 where one is found."""

    def work(watch: Watch) -> Diagnosis:
        from codebook_tools.workflows.diagnose import diagnose as run_diagnose

        return run_diagnose(request_of(model, options), watch, against, trace)

    run_and_show(work, options)
