"""The page of a comparison: every strategy and control, their errors and their spread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from codebook_tools.report.html.operate import about
from codebook_tools.report.html.page import Page, Part, Plot, Table
from codebook_tools.workflows.comparison_rows import Comparison, Summary, notes, table_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def compared_page(found: Comparison, command: str) -> Page:
    """command: what the user typed."""
    summaries = found.summaries
    return Page(
        title=f"codebook compare: {found.model}",
        headline=_headline(summaries),
        parts=[*_parts(summaries), *about(found.settings, found.seconds, found.version, found.seed)],
        command=command,
        warnings=(*found.warnings, *notes(summaries)),
    )


def _last(summary: Summary) -> tuple[float, float] | None:
    """Mean and spread of the error at the last stage there is."""
    for stage in ("finetuned", "surgery", "before"):
        if found := summary.stages.get(stage, {}).get("mse"):
            return found.mean, found.spread or 0.0
    return None


def _headline(summaries: list[Summary]) -> str:
    done = {f"{its.strategy} to {its.k} codes": error for its in summaries if (error := _last(its))}
    if not done:
        return f"{len(summaries)} strategies and controls, side by side."
    best = min(done, key=lambda name: done[name][0])
    mean, spread = done[best]
    within = sum(other <= mean + spread for other, _ in done.values()) - 1
    tied = f"; {within} more are within its spread" if within else ""
    return f"Of {len(summaries)} strategies and controls {best} ends with the lowest error, {mean:.6f}{tied}."


def _parts(summaries: list[Summary]) -> Iterator[Part]:
    head, *rows = (tuple(line) for line in table_rows(summaries))
    several = any(summary.seeds > 1 for summary in summaries)
    note = "Mean ± sample standard deviation over the seeds." if several else ""
    yield Table("Every strategy and the controls", head, tuple(rows), note)
    errors = {f"{its.strategy}, {its.k}": error for its in summaries if (error := _last(its))}
    if len(errors) > 1:
        yield _errors(errors)


def _errors(errors: dict[str, tuple[float, float]]) -> Plot:
    names = sorted(errors, key=lambda name: errors[name][0], reverse=True)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.errorbar(
            [errors[name][0] for name in names], range(len(names)), xerr=[errors[name][1] for name in names], fmt="o"
        )
        axes.set(yticks=range(len(names)), yticklabels=names, xlabel="squared error on test images", xscale="log")

    lowest = names[-1]
    return Plot(
        "The error at the last stage of each",
        f"Squared error of {len(names)} rows with their spread; the lowest is {lowest}, {errors[lowest][0]:.6f}.",
        draw,
        {"row": names, "mse": [errors[name][0] for name in names], "spread": [errors[name][1] for name in names]},
        (7.5, 0.8 + 0.28 * len(names)),
    )
