"""The page of a comparison: every strategy and control, their errors and their spread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from codebook_tools.report.html.axes import plain_log_ticks
from codebook_tools.report.html.page import PANEL, Page, Part, Plot, Table
from codebook_tools.report.html.result_page import result_page
from codebook_tools.workflows.comparison_rows import Comparison, Summary, notes, reconstructed, table_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_NOTE = "On test data. Seconds are those of surgery and fine-tuning, bytes those of the file that would be written."
_KEPT = " Kept is the state with the lowest validation error, with the number of seeds."


def compared_page(comparison: Comparison, command: str) -> Page:
    """The page of `codebook compare`."""
    summaries = comparison.summaries
    return result_page(comparison, _headline(summaries), _parts(summaries), command, notes(summaries))


def _last_error(summary: Summary, figure: str) -> tuple[float, float] | None:
    """Mean and spread of the error, "mse" or "distortion", in the last phase that was measured."""
    for phase in ("finetuned", "surgery", "before"):
        if error := summary.stages.get(phase, {}).get(figure):
            return error.mean, error.spread or 0.0
    return None


def _headline(summaries: list[Summary]) -> str:
    figure, what = _error_of(summaries)
    errors = {f"{row.strategy} to {row.k} codes": error for row in summaries if (error := _last_error(row, figure))}
    if not errors:
        return f"{len(summaries)} strategies and controls, side by side."
    best = min(errors, key=lambda name: errors[name][0])
    mean, spread = errors[best]
    within = sum(other <= mean + spread for other, _ in errors.values()) - 1
    tied = f"; {within} more within its spread" if within else ""
    return (
        f"Of {len(summaries)} strategies and controls {best} ends with the lowest {what}, {mean:{_form(figure)}}{tied}."
    )


def _parts(summaries: list[Summary]) -> Iterator[Part]:
    head, *rows = (tuple(line) for line in table_rows(summaries))
    several = any(summary.seeds > 1 for summary in summaries)
    kept = _KEPT if reconstructed(summaries) else ""
    spread = " Figures are mean ± sample standard deviation over the seeds." if several else ""
    yield Table("Every strategy and the controls", head, tuple(rows), f"{_NOTE}{kept}{spread}")
    figure, _ = _error_of(summaries)
    errors = {f"{row.strategy}, {row.k}": error for row in summaries if (error := _last_error(row, figure))}
    if len(errors) > 1:
        yield _errors_plot(errors, figure)


def _error_of(summaries: list[Summary]) -> tuple[str, str]:
    """The figure by which rows are ranked, and what it is called."""
    return ("mse", "error") if reconstructed(summaries) else ("distortion", "distortion")


def _form(figure: str) -> str:
    return ".6f" if figure == "mse" else ".4g"


def _errors_plot(errors: dict[str, tuple[float, float]], label: str) -> Plot:
    """errors: mean and spread by row. label: the figure's name."""
    names = sorted(errors, key=lambda name: errors[name][0], reverse=True)
    means, spreads = ([errors[name][i] for name in names] for i in (0, 1))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.errorbar(means, range(len(names)), xerr=spreads, fmt="o")
        axes.set(yticks=range(len(names)), yticklabels=names, xlabel=f"{label} on test data", xscale="log")
        axes.margins(y=0.5 / len(names))
        axes.grid(axis="y", linewidth=0.4)
        plain_log_ticks(axes.xaxis)

    return Plot(
        f"{'Error' if label == 'mse' else 'Distortion'} in the last state of each strategy and K",
        f"Squared error of {len(names)} rows with their spread; the lowest is {names[-1]}, {means[-1]:{_form(label)}}.",
        (draw,),
        {"row": names, label: means, "spread": spreads},
        (PANEL[0], 0.8 + 0.28 * len(names)),
    )
