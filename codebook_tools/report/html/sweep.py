"""The page of a sweep: the K that suffices, and the curves that say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from codebook_tools.evaluation.figures import Measurement
from codebook_tools.report.html.page import INK, Page, Part, Plot, Table
from codebook_tools.report.html.result_page import result_page
from codebook_tools.workflows.sweep import Sweep, sweep_rows

if TYPE_CHECKING:
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
    yield Table("Every point", head, tuple(rows), f"On test data, without fine-tuning.{effective}", frozenset(marked))


def curves_plot(sweep: Sweep) -> Plot:
    """Distortion and error over K, and over bits; Re-Fits with a price for bits are in the latter alone."""
    points = [(row.strategy, row.k, measured) for row in sweep.points if (measured := row.stages["surgery"])]
    before = sweep.points[0].stages["before"]
    sizes = sorted({row.k for row in sweep.points if row.strategy == "refit"})
    with_error = all(measured.mse is not None for *_, measured in points)

    def bits(measured: Measurement) -> float:
        return measured.codebooks[0].bits

    figures: dict[str, Callable[[Measurement], float]] = {"distortion": lambda stage: stage.codebooks[0].distortion}
    if with_error:
        figures["error"] = lambda stage: stage.error

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(figures), 2, squeeze=False)
        for row, (label, value) in zip(panels, figures.items(), strict=True):
            over_k, over_bits = row
            for name in ("refit", "prune", "quantize"):
                of_strategy = [(k, measured) for strategy, k, measured in points if strategy == name]
                if not of_strategy:
                    continue
                values = [value(measured) for _, measured in of_strategy]
                over_k.loglog([k for k, _ in of_strategy], values, ".-", label=name)
                over_bits.semilogy([bits(measured) for _, measured in of_strategy], values, ".-")
            paid = [measured for strategy, _, measured in points if strategy.startswith("refit,")]
            if paid:
                over_bits.semilogy([*map(bits, paid)], [*map(value, paid)], "x", label="refit that pays for bits")
            if before:
                over_bits.plot(bits(before), value(before), "*", color=INK, label="as it was")
            over_k.axvline(sweep.suggested_k, linewidth=0.7, linestyle=":")
            over_k.set_xticks(sizes, [str(k) for k in sizes])
            over_k.set(ylabel=label)
            for axes in row:
                axes.minorticks_off()
        over_k.set_xlabel("codes")
        over_bits.set_xlabel("bits a token")
        over_k.legend()
        if over_bits.get_legend_handles_labels()[0]:
            over_bits.legend()

    return Plot(
        "Distortion and error over K",
        f"{' and '.join(figures).capitalize()} over K and over bits, on test data. {sweep.headline}.",
        draw,
        {
            "strategy": [name for name, *_ in points],
            "k": [k for _, k, _ in points],
            "bits": [bits(measured) for *_, measured in points],
            "perplexity": [measured.codebooks[0].perplexity for *_, measured in points],
            "distortion": [measured.codebooks[0].distortion for *_, measured in points],
            "mse": [measured.mse for *_, measured in points],
        },
        (9, 3 * len(figures)),
    )
