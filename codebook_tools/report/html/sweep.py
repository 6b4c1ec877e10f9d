"""The page of a sweep: the K that suffices, and the curves that say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from codebook_tools.evaluation.figures import Measurement
from codebook_tools.report.html.axes import plain_log_ticks
from codebook_tools.report.html.page import INK, Page, Part, Plot, Table
from codebook_tools.report.html.result_page import result_page
from codebook_tools.workflows.sweep import Sweep, sweep_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def swept_page(sweep: Sweep, command: str) -> Page:
    """The page of `codebook sweep`."""
    return result_page(sweep, f"{sweep.headline}.", _parts(sweep), command)


def _parts(sweep: Sweep) -> Iterator[Part]:
    head, *rows = sweep_rows(sweep)
    marked = {i for i, row in enumerate(rows) if row[:2] == ("refit", str(sweep.suggested_k))}
    dimension = sweep.effective_dimension
    effective = "" if dimension is None else f" The effective dimension of the latents is {dimension:.1f}."
    yield curves_plot(sweep)
    note = f"On test data, without fine-tuning. The marked row has the suggested K.{effective}"
    yield Table("Every strategy and K", head, tuple(rows), note, frozenset(marked))


def curves_plot(sweep: Sweep) -> Plot:
    """Distortion and mse over K, and over bits; Re-Fits with a price for bits are in the latter alone."""
    points = [(row.strategy, row.k, measured) for row in sweep.points if (measured := row.stages["surgery"])]
    before = sweep.points[0].stages["before"]
    sizes = sorted({row.k for row in sweep.points if row.strategy == "refit"})
    with_error = all(measured.mse is not None for *_, measured in points)

    def bits(measured: Measurement) -> float:
        return measured.codebooks[0].bits

    figures: dict[str, Callable[[Measurement], float]] = {"distortion": lambda stage: stage.codebooks[0].distortion}
    if with_error:
        figures["mse"] = lambda stage: stage.error

    def draw(label: str, over: str, figure: Figure) -> None:
        axes, value = figure.subplots(), figures[label]
        for name in ("refit", "prune", "quantize"):
            of_strategy = [(k, measured) for strategy, k, measured in points if strategy == name]
            along = [k if over == "K" else bits(measured) for k, measured in of_strategy]
            if of_strategy:
                axes.semilogy(along, [value(measured) for _, measured in of_strategy], ".-", label=name)
        if over == "K":
            axes.set_xscale("log")
            axes.set_xticks(sizes, [str(k) for k in sizes])
            axes.minorticks_off()
            axes.axvline(sweep.suggested_k, color=INK, linewidth=0.7, linestyle=":", label="suggested K")
        else:
            draw_more(axes, value)
        axes.set(xlabel=over, ylabel=label)
        plain_log_ticks(axes.yaxis)
        axes.legend()

    def draw_more(axes: Axes, value: Callable[[Measurement], float]) -> None:
        paid = [measured for strategy, _, measured in points if strategy.startswith("refit,")]
        if paid:
            axes.semilogy([*map(bits, paid)], [*map(value, paid)], "x", label="refit with a price on bits")
        if before:
            axes.plot(bits(before), value(before), "*", color=INK, label="before")

    return Plot(
        "Distortion and mse over K, and over bits" if with_error else "Distortion over K, and over bits",
        f"{' and '.join(figures).capitalize()} over K and over bits, on test data. {sweep.headline}.",
        [partial(draw, label, over) for label in figures for over in ("K", "bits per token")],
        {
            "strategy": [name for name, *_ in points],
            "k": [k for _, k, _ in points],
            "bits": [bits(measured) for *_, measured in points],
            "perplexity": [measured.codebooks[0].perplexity for *_, measured in points],
            "distortion": [measured.codebooks[0].distortion for *_, measured in points],
            **({"mse": [measured.mse for *_, measured in points]} if with_error else {}),
        },
    )
