"""`codebook decode`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codebook_tools.workflows.request import Request

from ..options import DATA, MODEL, PASS, ModelArgument, command, parameters
from ..run import request_of, run_and_show

if TYPE_CHECKING:  # imported where it is used: --help must not import torch
    from codebook_tools.runtime.progress import Watch
    from codebook_tools.workflows.decode import Decoding

_LIKE = "Data like those that were encoded: they show the shape of an item, where tokens do not tell it."


@command(
    "Check and carry over",
    "codebook decode codes.npy model.safetensors -o decoded",
    parameters(Request, "output", help="A new folder. Left out: <name>.decoded beside TOKENS.", metavar="FOLDER"),
    parameters(Request, "data", help=_LIKE, panel="Data"),
    [one for one in DATA if one.name in ("size", "channels", "skip_bad")],
    *(MODEL, PASS),
)
def decode(
    options: dict[str, Any],
    tokens: Annotated[
        Path, typer.Argument(metavar="TOKENS", help="A .npy, .safetensors, .parquet or .jsonl file, as of `encode`.")
    ],
    model: ModelArgument = None,
) -> None:
    """Turn tokens back into media: images as .png, sound as .wav, other arrays as one .npy."""

    def work(watch: Watch) -> Decoding:
        from codebook_tools.workflows.decode import decode as run_decode

        output = options["output"] or tokens.with_name(f"{tokens.stem}.decoded")
        return run_decode(request_of(model, {**options, "output": None}), tokens, output, watch)

    run_and_show(work, {**options, "report": None})
