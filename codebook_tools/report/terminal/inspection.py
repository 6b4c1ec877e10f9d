"""The table of `codebook inspect`, in a file of its own because the other tables import torch."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from codebook_tools.models.evidence import alive_line
from codebook_tools.workflows.inspect_checkpoint import Inspection

_FEW = 10  # tensors that are listed: where K is a number of channels, too, there are hundreds


def inspection_table(inspection: Inspection) -> RenderableType:
    """The codebooks of a checkpoint, its family, and tensors that may follow K."""
    detection = inspection.detection
    if not detection.codebooks:
        return Text(f"no codebook: {detection.reason}")
    table = Table("codebook", "codes", "dim", "dtype", "search", "sure", box=None, pad_edge=False, header_style="bold")
    for book in detection.codebooks:
        sure = {"high": "yes", "low": "no: name it with --codebook-key"}[book.confidence]
        table.add_row(book.key, str(book.size), str(book.dim), book.dtype, book.search, sure)
    family = inspection.family or "unknown; give the network with --network FILE.py:FUNCTION to work on it"
    parts: list[RenderableType] = [Text(f"family: {family}"), table]
    if inspection.why_not:
        parts.append(Text(inspection.why_not))
    parts += [
        Text(f"follows {book.key}: {', '.join(book.companions)}") for book in detection.codebooks if book.companions
    ]
    parts += [
        Text(alive_line(inspection.alive[book.key], book))
        for book in detection.codebooks
        if book.key in inspection.alive
    ]
    parts += [Text(line) for line in (*inspection.remarks, *inspection.warnings)]
    if detection.elsewhere:
        parts.append(Text("other tensors whose shape may follow K (K, or n K for n codebooks, and up to 4 more):"))
        parts += [Text(f"  {key} {list(shape)}") for key, shape in detection.elsewhere[:_FEW]]
        more = len(detection.elsewhere) - _FEW
        parts += [Text(f"  and {more} more, which --json lists")] if more > 0 else []
    return Group(*parts)
