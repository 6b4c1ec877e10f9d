"""What comes after a surgery: its result is checked, and tokens and priors follow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import reported, show_result
from .options import DataOptions, ModelOptions, RemapOptions, RunOptions, takes
from .run import request_of

if TYPE_CHECKING:
    from codebook_tools.models.proof import Proof

followers = typer.Typer()


@followers.command(
    epilog="Example: codebook verify model.refit-k128.safetensors --against model.safetensors",
    rich_help_panel="Check and carry over",
)
@takes(DataOptions, ModelOptions, RunOptions)
def verify(
    given: dict[str, Any],
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The checkpoint that was written.")],
    against: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="The original. Left out: the bundled demo, and with --network none."),
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

    With --network, --family or --data also against the network that loads it; any file can be checked so.
    """
    with reported():
        from codebook_tools.models.demo import DEMO
        from codebook_tools.report.terminal.tables import verification_table
        from codebook_tools.runtime.progress import Watch
        from codebook_tools.workflows.verify import verify_alone, verify_checkpoint

        from .output import ProgressShow

        prove: Callable[[], Proof] | None = None
        if given["network"] or given["family"] or given["data"]:
            from codebook_tools.workflows.session import prove_request

            request = request_of(model, given)
            prove = partial(prove_request, request, Watch(ProgressShow(given["quiet"])))
        if prove is not None and against is None and not map_:
            found = verify_alone(model, prove)
        else:
            found = verify_checkpoint(model, against or DEMO, map_ or [], prove)
        show_result(found, verification_table, given["json_"])
        if not found.ok:
            raise typer.Exit(3)


@followers.command(
    epilog="Example: codebook remap tokens.npy prior/ --map model.prune-k86.index_map.safetensors",
    rich_help_panel="Check and carry over",
)
@takes(RemapOptions)
def remap(
    given: dict[str, Any],
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="TOKENS|PRIOR...",
            help="Token files (.npy, .safetensors, .parquet, .tar), and priors: a .safetensors file or a directory.",
        ),
    ],
    maps: Annotated[
        list[Path],
        typer.Option("--map", metavar="FILE", help="The index map. Repeated: those of surgeries in a row, in order."),
    ],
) -> None:
    """Rewrite stored tokens, or a prior's embedding and head, by the index map of a surgery."""
    with reported():
        from codebook_tools.remapping.remap import RemapRequest
        from codebook_tools.remapping.remap import remap as run_remap
        from codebook_tools.remapping.token_ids import parse_on_removed
        from codebook_tools.report.terminal.tables import remap_table

        from .output import print_warnings

        request = RemapRequest(
            sources=tuple(sources),
            maps=tuple(maps),
            on_removed=parse_on_removed(given["on_removed"]),
            offset=given["offset"],
            special=given["special"],
            codebook_key=tuple(given["codebook_key"] or ()),
            axis=given["axis"],
            key=tuple(given["key"] or ()),
            embedding_key=tuple(given["embedding_key"] or ()),
            head_key=tuple(given["head_key"] or ()),
            pad_to_multiple=given["pad_to_multiple"],
            output=given["output"],
            force=given["force"],
        )
        found = run_remap(request)
        print_warnings(found.warnings, given["quiet"])
        show_result(found, remap_table, given["json_"])
