"""`codebook remap`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from codebook_tools.remapping.request import RemapRequest
from codebook_tools.runtime.options import values

from ..errors import reported, show_result
from ..options import JSON, QUIET, command, parameters


@command(
    "Check and carry over",
    "codebook remap tokens.npy prior/ --map model.prune-k86.index_map.safetensors",
    *(parameters(RemapRequest), JSON, QUIET),
)
def remap(
    options: dict[str, Any],
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="TOKENS|PRIOR...",
            help="Tokens (.npy, .safetensors, .parquet, .jsonl, .tar), and priors: a .safetensors file or a directory.",
        ),
    ],
    maps: Annotated[
        list[Path],
        typer.Option("--map", metavar="FILE", help="The index map. Repeated: those of surgeries in a row, in order."),
    ],
) -> None:
    """Rewrite stored tokens, or a prior's embedding and head, by the index map of a surgery."""
    with reported():
        from codebook_tools.remapping.remap import remap as run_remap
        from codebook_tools.report.terminal.tables import remap_table

        from ..output import print_warnings

        result = run_remap(RemapRequest(tuple(sources), tuple(maps), **values(RemapRequest, options)))
        print_warnings(result.warnings, options["quiet"])
        show_result(result, remap_table, options["json_"])
