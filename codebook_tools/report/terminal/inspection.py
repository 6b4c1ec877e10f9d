"""The table of `codebook inspect`, in a file of its own because the other tables import torch."""

from __future__ import annotations

from rich.console import Group, RenderableType

from codebook_tools.checkpoints.matrices import listed
from codebook_tools.models.evidence import alive_line
from codebook_tools.report.terminal.fitted import FittedTable, Prose
from codebook_tools.workflows.inspect_checkpoint import Inspection

_FEW = 10  # tensors that are listed: where K is a number of channels, too, there are hundreds


def inspection_table(inspection: Inspection) -> RenderableType:
    """The codebooks of a checkpoint, its family, and tensors that may follow K."""
    detection = inspection.detection
    if not detection.codebooks:
        return Prose(f"no codebook was recognized: {detection.reason}{listed(inspection.matrices)}")
    lines = [("codebook", "codes", "dim", "dtype", "search", "sure")]
    for book in detection.codebooks:
        sure = {"high": "yes", "low": "no: name it with --codebook-key"}[book.confidence]
        lines.append((book.key, str(book.size), str(book.dim), book.dtype, book.search, sure))
    family = inspection.family or "unknown; give the network with --network FILE.py:FUNCTION to work on it"
    parts: list[RenderableType] = [Prose(f"family: {family}"), FittedTable(lines, numbers=False)]
    if inspection.why_not:
        parts.append(Prose(inspection.why_not))
    parts += [
        Prose(f"follows {book.key}: {', '.join(book.companions)}") for book in detection.codebooks if book.companions
    ]
    parts += [
        Prose(alive_line(inspection.alive[book.key], book))
        for book in detection.codebooks
        if book.key in inspection.alive
    ]
    parts += [Prose(line) for line in (*inspection.remarks, *inspection.warnings)]
    if detection.elsewhere:
        parts.append(Prose("other tensors whose shape may follow K (K, or n K for n codebooks, and up to 4 more):"))
        parts += [Prose(f"  {key} {list(shape)}") for key, shape in detection.elsewhere[:_FEW]]
        more = len(detection.elsewhere) - _FEW
        parts += [Prose(f"  and {more} more, which --json lists")] if more > 0 else []
    return Group(*parts)
