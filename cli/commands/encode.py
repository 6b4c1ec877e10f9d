"""`codebook encode`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import DATA, MODEL, OUTPUT, PASS, BeamOption, ModelArgument, command
from ..run import named_after, request_of, run_and_show

if TYPE_CHECKING:  # imported where it is used: --help must not import torch
    from codebook_tools.runtime.progress import Watch
    from codebook_tools.workflows.encode import Encoding

_TEXT = "A .npy, .safetensors, .parquet or .jsonl file. Left out: <name>.tokens.npy in the current folder."


@command(
    "Check and carry over",
    "codebook encode model.safetensors --data images/ -o codes.npy",
    *(OUTPUT(_TEXT), [one for one in DATA if one.name != "test_data"], MODEL, PASS),
)
def encode(
    options: dict[str, Any],
    model: ModelArgument = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Write part I, from 1, of N alone: parts in order are the whole."),
    ] = None,
    beam: BeamOption = 1,
) -> None:
    """Write the tokens of all data, in order of name. They are not split: all of --data is encoded."""

    def work(watch: Watch) -> Encoding:
        from codebook_tools.workflows.encode import encode as run_encode
        from codebook_tools.workflows.measure_shards import parse_shard

        output = options["output"] or named_after(model, ".tokens.npy")
        request = request_of(model, {**options, "output": None})
        return run_encode(request, output, watch, parse_shard(shard) if shard else None, beam)

    run_and_show(work, {**options, "report": None})
