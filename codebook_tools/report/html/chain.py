"""The page of surgeries in a row: the model as it was, and after each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from codebook_tools.report.html.operate import about, gallery, headline, trace_plot, usage_plot
from codebook_tools.report.html.page import Page, Part, Table
from codebook_tools.report.terminal.tables import chain_rows
from codebook_tools.workflows.chain import Chain


def chained_page(found: Chain, command: str, more: Sequence[Part] = ()) -> Page:
    """command: what the user typed. more: on the model that was written."""
    return Page(
        title=f"codebook run: {found.model}",
        headline=headline(found.model, found.steps[0].before, found.steps[-1].kept_stage),
        parts=[*_parts(found), *more, *about(found.settings, found.seconds, found.version, found.seed)],
        command=command,
        warnings=found.warnings,
    )


def _parts(found: Chain) -> Iterator[Part]:
    head, *rows = chain_rows(found)
    yield Table("Step by step", head, tuple(rows), "On test images that no step trained on.")
    if found.shown:
        yield gallery(found.shown)
    stages = {"before": found.steps[0].before}
    stages |= {f"{i}, {step.command}": step.kept_stage for i, step in enumerate(found.steps, 1)}
    counts = {name: stage.counts[0] for name, stage in stages.items() if stage and stage.counts}
    if counts:
        yield usage_plot("How often codes are used", counts)
    for i, step in enumerate(found.steps, 1):
        if len(step.trace) > 1:
            yield trace_plot(f"{i}, {step.command}, step by step", step.trace)
