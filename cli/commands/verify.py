"""`codebook verify`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import reported, show_result
from ..options import DATA, LATENTS, MODEL, RUN, command
from ..run import request_of

if TYPE_CHECKING:
    from codebook_tools.models.proof import Proof


@command(
    "Check and carry over",
    "codebook verify model.refit-k128.safetensors --against model.safetensors",
    *(DATA, LATENTS, MODEL, RUN),
)
def verify(
    options: dict[str, Any],
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The checkpoint that was written.")],
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="The original that the surgery started from. Left out: the demo, of its results; with --network none.",
        ),
    ] = None,
    map_: Annotated[
        list[Path] | None,
        typer.Option(
            "--map",
            metavar="FILE",
            help="Its index map. Left out: the one beside it. Of a prior: those that it followed. Repeatable.",
        ),
    ] = None,
) -> None:
    """Check a written checkpoint and its index map against the original. Exit code 3 where something is wrong.

    With --network, --family, --data or --latents also against the network that loads it; any file can be checked so.
    """
    with reported():
        from codebook_tools.report.terminal.tables import verification_table
        from codebook_tools.runtime.progress import Watch
        from codebook_tools.workflows.verify import original_of, verify_alone, verify_checkpoint

        from ..output import ProgressShow

        prove: Callable[[], Proof] | None = None
        if options["network"] or options["family"] or options["data"] or options["latents"]:
            from codebook_tools.workflows.without_network import prove_request

            request = request_of(model, options)
            prove = partial(prove_request, request, Watch(ProgressShow(options["quiet"])))
        if prove is not None and against is None and not map_:
            verification = verify_alone(model, prove)
        else:
            verification = verify_checkpoint(model, against or original_of(model), map_ or [], prove)
        show_result(verification, verification_table, options["json_"])
        if not verification.ok:
            raise typer.Exit(3)
