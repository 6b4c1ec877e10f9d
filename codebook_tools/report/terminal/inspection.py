"""What a checkpoint holds, as a table: apart from the other tables, for these import torch."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from codebook_tools.models.evidence import alive_line
from codebook_tools.workflows.inspect_checkpoint import Inspection

FEW = 10
"""Tensors that are shown: where K is a number of channels, too, there are hundreds."""


def inspection_table(found: Inspection) -> RenderableType:
    """The codebooks of a checkpoint."""
    detection = found.detection
    if not detection.codebooks:
        return Text(f"no codebook: {detection.reason}")
    table = Table("codebook", "codes", "dim", "dtype", "search", "sure", box=None, pad_edge=False, header_style="bold")
    for book in detection.codebooks:
        sure = {"high": "yes", "low": "no: name it with --codebook-key"}[book.confidence]
        table.add_row(book.key, str(book.size), str(book.dim), book.dtype, book.search, sure)
    family = found.family or "unknown; give the network with --network FILE.py:FUNCTION to work on it"
    parts: list[RenderableType] = [Text(f"family: {family}"), table]
    if found.why_not:
        parts.append(Text(found.why_not))
    parts += [
        Text(f"follows {book.key}: {', '.join(book.companions)}") for book in detection.codebooks if book.companions
    ]
    parts += [Text(alive_line(found.alive[book.key], book)) for book in detection.codebooks if book.key in found.alive]
    parts += [Text(line) for line in (*found.remarks, *found.warnings)]
    if detection.elsewhere:
        parts.append(Text("other tensors whose shape may follow K (K, or n K for n codebooks, and up to 4 more):"))
        parts += [Text(f"  {key} {list(shape)}") for key, shape in detection.elsewhere[:FEW]]
        more = len(detection.elsewhere) - FEW
        parts += [Text(f"  and {more} more, which --json lists")] if more > 0 else []
    return Group(*parts)
