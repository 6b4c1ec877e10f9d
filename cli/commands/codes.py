"""`codebook codes`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..options import DATA, MODEL, RUN, ModelArgument, command
from ..run import named_after, request_of, run_and_show

if TYPE_CHECKING:  # imported where it is used: --help must not import torch
    from codebook_tools.runtime.progress import Watch
    from codebook_tools.workflows.code_cards import Codes


@command("Look", "codebook codes model.safetensors --data images/ --sort error", DATA, MODEL, RUN)
def codes(
    options: dict[str, Any],
    model: ModelArgument = None,
    top: Annotated[int, typer.Option("--top", metavar="N", help="Patches of each kind for a code.")] = 6,
    most: Annotated[int, typer.Option("--most", metavar="N", help="At most so many codes.")] = 512,
    sort: Annotated[
        Literal["share", "map", "error"], typer.Option(help="Which codes come first; map: by what they look like.")
    ] = "share",
    latents: Annotated[list[str] | None, typer.Option(hidden=True)] = None,
) -> None:
    """What each code stands for: its patches, what it decodes to, its neighbors; and images with their tokens.

    The page goes to --report; left out: <name>.codes.html in the current folder.
    """

    def work(watch: Watch) -> Codes:
        from codebook_tools.workflows.code_cards import look_at_codes

        return look_at_codes(request_of(model, {**options, "latents": latents}), top, most, sort, watch)

    run_and_show(work, {**options, "report": options["report"] or named_after(model, ".codes.html")})
