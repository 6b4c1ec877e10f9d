"""Tables of figures: the rows of the phases, and the columns of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from codebook_tools.evaluation.figures import STAGES, CodebookUse, Figure, Measurement, figures_of

COLUMNS = (
    ("mse at step 0", "mse", "surgery", ".6f"),
    ("used at step 0", "used", "surgery", ".0f"),
    ("mse fine-tuned", "mse", "finetuned", ".6f"),
    ("used", "used", "finetuned", ".1f"),
    ("perplexity", "perplexity", "finetuned", ".1f"),
    ("coverage", "coverage", "finetuned", ".3f"),
)
"""Columns of the table of a comparison: heading, figure, stage and format."""

COLUMNS_OF_LATENTS = (
    ("distortion", "distortion", "surgery", ".4g"),
    ("used", "used", "surgery", ".1f"),
    ("perplexity", "perplexity", "surgery", ".1f"),
    ("coverage", "coverage", "surgery", ".3f"),
)
"""Those where nothing was reconstructed, for there were only latents."""


def in_markdown(lines: Sequence[Sequence[str]]) -> str:
    """Format a table, headings first, in Markdown."""
    head, *rows = lines
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *rows))


def stage_rows(stages: Mapping[str, Measurement | None], kept: str | None) -> list[tuple[str, ...]]:
    """Table of the figures of each stage.

    Args:
        stages: By their keys in STAGES; absent ones are None.
        kept: The stage that was kept, which is starred where there are others; None for a mere measurement.

    Returns:
        Rows of equal length, headings first.
    """
    present = {name: stage for name, stage in stages.items() if stage is not None}
    names = {name: STAGES[name] if kept else "measured" for name in present}
    if len(present) > 1 and kept in present:
        names[kept] += " *"
    return rows_of({names[name]: stage for name, stage in present.items()})


def rows_of(stages: Mapping[str, Measurement | None]) -> list[tuple[str, ...]]:
    """Table of the figures of measurements by heading, headings first; figures that all lack are left out."""
    present = {name: stage for name, stage in stages.items() if stage is not None}
    rows = [("", *present)]
    for kind in (CodebookUse, Measurement):
        for name, figure in figures_of(kind).items():
            cells = [_cell(kind, name, figure, stage) for stage in present.values()]
            if figure.label and any(cell != "-" for cell in cells):
                rows.append((figure.label, *cells))
    return rows


def _cell(kind: type, name: str, figure: Figure, stage: Measurement) -> str:
    if figure.cell:
        return figure.cell(stage)
    values = [getattr(record, name) for record in (stage.codebooks if kind is CodebookUse else (stage,))]
    if None in values:
        return "-"
    low, high = format(min(values), figure.form), format(max(values), figure.form)
    return low if low == high else f"{low} to {high}"
