"""`codebook measure`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import DATA, FIGURES, LATENTS, MODEL, REPLACE, RUN, BeamOption, ModelArgument, command
from ..run import request_of, run_and_show

if TYPE_CHECKING:  # imported where it is used: --help must not import torch
    from codebook_tools.runtime.progress import Watch
    from codebook_tools.workflows.result import Result


@command(
    "Look",
    "codebook measure model.safetensors --data images/ --test-data held-out/",
    *(LATENTS, REPLACE, DATA, FIGURES, MODEL, RUN),
)
def measure(
    options: dict[str, Any],
    model: ModelArgument = None,
    more: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE", help="More files of --merge, as a pattern names them.", show_default=False),
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write counts and a sample of latents of the --data, or else of the --test-data, for --stats there.",
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Part I, from 1, of N of the data alone, into --stats; for --merge."),
    ] = None,
    merge: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Add what all shards wrote, in place of data: one pass, in any order."),
    ] = None,
    beam: BeamOption = 1,
) -> None:
    """Usage, perplexity, distortion and reconstruction error on the test data."""
    if more and not merge:
        raise typer.BadParameter(f"{more[0]}: one MODEL at a time; more files go with --merge")

    def work(watch: Watch) -> Result:
        from codebook_tools.workflows.measure_shards import parse_shard
        from codebook_tools.workflows.operate import measure_model

        part = parse_shard(shard) if shard else None
        return measure_model(request_of(model, options), watch, stats, part, [*(merge or ()), *(more or ())], beam)

    run_and_show(work, options)
