"""The page of a sweep: the K that suffices, and the curves that say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from codebook_tools.evaluation.figures import Measurement
from codebook_tools.report.html.operate import about
from codebook_tools.report.html.page import INK, Page, Part, Plot, Table
from codebook_tools.workflows.sweep import Sweep, sweep_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def swept_page(found: Sweep, command: str) -> Page:
    """command: what the user typed."""
    return Page(
        title=f"codebook sweep: {found.model}",
        headline=f"{found.headline}.",
        parts=[*_parts(found), *about(found.settings, found.seconds, found.version, found.seed)],
        command=command,
        warnings=found.warnings,
    )


def _parts(found: Sweep) -> Iterator[Part]:
    head, *rows = sweep_rows(found)
    marked = {i for i, row in enumerate(rows) if row[:2] == ("refit", str(found.suggested_k))}
    dimension = found.effective_dimension
    told = "" if dimension is None else f" The effective dimension of the latents is {dimension:.1f}."
    yield curves_plot(found)
    yield Table("Every point", head, tuple(rows), f"On test data, without fine-tuning.{told}", frozenset(marked))


def curves_plot(found: Sweep) -> Plot:
    """Distortion and error over K, and over bits; Re-Fits that pay for bits are in the latter alone."""
    points = [(row.strategy, row.k, measured) for row in found.points if (measured := row.stages["surgery"])]
    before = found.points[0].stages["before"]
    with_error = all(measured.mse is not None for *_, measured in points)

    def bits(measured: Measurement) -> float:
        return measured.codebooks[0].bits

    shown: dict[str, Callable[[Measurement], float]] = {"distortion": lambda found: found.codebooks[0].distortion}
    if with_error:
        shown["error"] = lambda found: found.error

    def draw(figure: Figure) -> None:
        for row, (what, value) in zip(figure.subplots(len(shown), 2, squeeze=False), shown.items(), strict=True):
            over_k, over_bits = row
            for name in ("refit", "prune", "quantize"):
                its = [(k, measured) for strategy, k, measured in points if strategy == name]
                if not its:
                    continue
                over_k.loglog([k for k, _ in its], [value(measured) for _, measured in its], ".-", label=name)
                over_bits.semilogy([bits(measured) for _, measured in its], [value(m) for _, m in its], ".-")
            paid = [measured for strategy, _, measured in points if strategy.startswith("refit,")]
            if paid:
                label = "refit that pays for bits"
                over_bits.semilogy([*map(bits, paid)], [*map(value, paid)], "x", label=label)
            if before:
                over_bits.plot(bits(before), value(before), "*", color=INK, label="as it was")
            over_k.axvline(found.suggested_k, linewidth=0.7, linestyle=":")
            over_k.set_xticks(sizes_of(found), [str(k) for k in sizes_of(found)])
            over_k.set(ylabel=what)
            for axes in row:
                axes.minorticks_off()
        over_k.set_xlabel("codes")
        over_bits.set_xlabel("bits a token")
        over_k.legend()
        if over_bits.get_legend_handles_labels()[0]:
            over_bits.legend()

    return Plot(
        "Distortion and error over K",
        f"{' and '.join(shown).capitalize()} over K and over bits, on test data. {found.headline}.",
        draw,
        {
            "strategy": [name for name, *_ in points],
            "k": [k for _, k, _ in points],
            "bits": [measured.codebooks[0].bits for *_, measured in points],
            "perplexity": [measured.codebooks[0].perplexity for *_, measured in points],
            "distortion": [measured.codebooks[0].distortion for *_, measured in points],
            "mse": [measured.mse for *_, measured in points],
        },
        (9, 3 * len(shown)),
    )


def sizes_of(found: Sweep) -> list[int]:
    return sorted({row.k for row in found.points if row.strategy == "refit"})
