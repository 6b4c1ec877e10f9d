"""How many codes? Error, distortion and bits over K right after each surgery, and the K from which more gain little."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from codebook_tools.checkpoints.atomic import write_text
from codebook_tools.clustering.engines import chosen
from codebook_tools.codebook import Engine, Strategy
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation import metrics
from codebook_tools.evaluation.figures import STAGES, Figure, Measurement, quoted_in
from codebook_tools.evaluation.tables import in_markdown
from codebook_tools.runtime import distributed
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import Prune, Quantize, Refit
from codebook_tools.strategies.entropy_refit import EntropyRefit
from codebook_tools.workflows.comparison_rows import Row, RowStore, check_folder, made_with
from codebook_tools.workflows.pipeline import (
    Calibration,
    calibrate,
    current_tokens,
    encoder_latents,
    measure_stage,
    on_cpu,
    perform,
)
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.result import SUBJECT, ResultHeader, header, settings_of
from codebook_tools.workflows.target import Streamed
from codebook_tools.workflows.without_network import open_target

PAYS = 0.025
"""Share of the error that twice the codes must take away."""


@dataclass(frozen=True, kw_only=True)
class Sweep(ResultHeader):
    """The result of `sweep`.

    Attributes:
        points: Surgeries: Re-Fits by rising K, then one for each price, then prune and quantize.
        effective_dimension: Of the latents, by the slope of Re-Fit's distortion over K; None of one K.
        suggested_k: One of those asked for.
        reason: Why, in a sentence.
    """

    points: tuple[Row, ...]
    effective_dimension: float | None
    suggested_k: int
    reason: str

    json_keys = (
        *SUBJECT,
        *("effective_dimension", "suggested_k", "reason", "outputs", "seconds", "command", "version"),
    )

    @property
    def headline(self) -> str:
        """Which K suffices, and why; or that none does that was tried."""
        tried = [row.k for row in self.points if row.strategy == "refit"]
        if self.suggested_k == max(tried):
            return f"No K that was tried is known to suffice: {self.reason}"
        return f"{self.suggested_k} codes suffice: {self.reason}"

    def to_json(self) -> dict[str, Any]:
        """The promised keys."""
        points = [{name: row.to_json()[name] for name in ("strategy", "k", "stages")} for row in self.points]
        return super().to_json() | {"points": points}


def sweep(
    request: Request,
    sizes: Sequence[int],
    prices: Sequence[float],
    folder: Path,
    watch: Watch,
    engine: Engine = "auto",
) -> Sweep:
    """Re-Fit to each size, from the codes of the size before; prune and quantize, where they can.

    Rows go to folder/rows.json one by one, and those that are there, of the same model, data, settings and version, are
    not measured again; folder/table.md is the table of all.

    Args:
        request: The model and its data.
        sizes: Numbers of codes to try.
        prices: Of a bit, in variances of the latents: for each an entropy-constrained Re-Fit of the largest size.
        folder: For the rows and the table; made where it is missing.
        watch: Progress and seconds by phase.
        engine: Of all k-means; see clustering/engines.py.

    Raises:
        CodebookError: Re-Fit is possible at none of the sizes, or the folder cannot be written.
    """
    distributed.require_one("sweep")
    sizes = sorted(set(sizes))
    if not sizes:
        raise CodebookError("no size to try; name some, such as --k 16,32,64,128")
    check_folder(folder)
    store, opened = RowStore(folder), open_target(request, watch)
    calibration = calibrate(opened, watch)
    opened.warnings += calibration.first.remarks(exact=False)
    points = _swept(opened, calibration, sizes, prices, engine, store, watch)
    curve = {row.k: _surgery(row) for row in points if row.strategy == "refit"}
    if not curve:
        raise CodebookError(f"Re-Fit can be done to none of {sizes}: {opened.warnings[-1]}")
    suggested, reason = suggest(curve)
    left = {k: result.codebooks[0].distortion for k, result in curve.items()}
    table = folder / "table.md"
    choice = chosen(engine, max(sizes), opened.model.books[0].codebook.dim)
    opened.settings |= {"k": sizes, "lambda": [*prices], "engine": choice.engine, "engine_reason": choice.reason}
    result = Sweep(
        **header("sweep", opened),
        points=tuple(points),
        effective_dimension=metrics.effective_dimension(left) if len(left) > 1 else None,
        suggested_k=suggested,
        reason=reason,
        outputs={"rows": str(store.path), "table": str(table)},
        seconds=watch.seconds,
    )
    write_text(table, markdown(result))
    return result


def suggest(curve: Mapping[int, Measurement]) -> tuple[int, str]:
    """The smallest K of which no larger one lowers the error by `PAYS` for each doubling.

    Args:
        curve: Figures of Re-Fit by K, rising. Where nothing was reconstructed, distortions count in place of errors.

    Returns:
        K, and why.
    """
    what = "error" if all(measured.mse is not None for measured in curve.values()) else "distortion"
    left = {k: measured.error if what == "error" else measured.codebooks[0].distortion for k, measured in curve.items()}
    for (k, now), (more, then) in pairwise(left.items()):
        gain = 1 - (then / now) ** (1 / math.log2(more / k)) if now > 0 else 0.0
        if gain < PAYS:
            lowered = f"lower the untrained {what} by {max(gain, 0):.1%}"
            return k, f"from {k} codes on, twice as many {lowered}, less than {PAYS:.1%}"
    k = max(left)
    if len(left) == 1:
        return k, f"{k} is the only size there is"
    return k, f"up to {k} codes, the most there are, each doubling lowers the {what} by {PAYS:.1%} or more"


def sweep_rows(result: Sweep) -> list[tuple[str, ...]]:
    """The headings and the cells of a table, a line for each point."""
    measured = {name for row in result.points for name, value in vars(_surgery(row)).items() if value is not None}
    quoted = quoted_in(measured)
    labels = [str(figure.label) for figure in quoted.values()]
    head = ("strategy", "K", "used", "perplexity", "bits", "distortion", "mse", "coverage", *labels)
    lines = [head, *(_cells(row, quoted) for row in result.points)]
    if any(_surgery(row).mse is not None for row in result.points):
        return lines
    return [tuple(cell for heading, cell in zip(head, line, strict=True) if heading != "mse") for line in lines]


def _cells(row: Row, quoted: Mapping[str, Figure]) -> tuple[str, ...]:
    measured = _surgery(row)
    use = measured.codebooks[0]
    mse = "–" if measured.mse is None else f"{measured.mse:.6f}"
    coverage = "–" if use.coverage is None else f"{use.coverage:.3f}"
    figures = (f"{use.perplexity:.1f}", f"{use.bits:.2f}", f"{use.distortion:.4g}", mse, coverage)
    more = [figure.cell(measured) for figure in quoted.values() if figure.cell]
    return (row.strategy, str(row.k), str(use.used), *figures, *more)


def markdown(result: Sweep) -> str:
    """The table in Markdown, and the suggestion below it."""
    return f"{in_markdown(sweep_rows(result))}\n{result.headline}.\n"


def _surgery(row: Row) -> Measurement:
    measurement = row.stages["surgery"]
    assert measurement is not None
    return measurement


def _swept(
    opened: Streamed,
    calibration: Calibration,
    sizes: Sequence[int],
    prices: Sequence[float],
    engine: Engine,
    store: RowStore,
    watch: Watch,
) -> list[Row]:
    """All rows that can be made. One that cannot is a warning."""
    model, seed = opened.model, opened.request.seed
    books, latents = model.books, encoder_latents(opened)
    before, rows = measure_stage(opened, latents, watch), list[Row]()
    now, placed = calibration, books  # by the last Re-Fit
    used = int((calibration.first.counts > 0).sum())
    for name, strategy in _strategies(sizes, prices, seed, used, engine):
        goes_on = now is not calibration and name.startswith("refit")
        model.books = placed if goes_on else books
        hashed = made_with(opened, {"strategy": [name, settings_of(strategy)], "sizes": sizes, "seed": seed})
        since = watch.seconds["strategy"]
        try:
            perform(opened, strategy, now if goes_on else calibration, watch)
        except CodebookError as error:
            opened.warnings.append(f"{name}: {error}")
            continue
        if name == "refit":
            now, placed = _as_it_is(opened, calibration, watch), model.books
        size = opened.size
        row = store.find(name, size, seed, hashed)
        if row is None:
            stages = dict.fromkeys(STAGES) | {"before": before, "surgery": measure_stage(opened, latents, watch)}
            seconds = watch.seconds["strategy"] - since
            row = Row(name, size, seed, stages, "surgery", seconds, opened.bytes_at(size), None, hashed)
            store.add(row)
        rows.append(row)
    model.books = books
    return rows


def _strategies(
    sizes: Sequence[int], prices: Sequence[float], seed: int, used: int, engine: Engine
) -> Iterator[tuple[str, Strategy]]:
    """Names and strategies in order; a Re-Fit starts from the codes of the one before. used: before any surgery."""
    for i, k in enumerate(sizes):
        yield "refit", Refit(k, init="used" if i else "kmeans++", seed=seed, engine=engine)
    for price in prices:
        yield f"refit, {price:g} a bit", EntropyRefit(sizes[-1], price, seed=seed)
    fewer = [k for k in sizes if k < used]
    yield from (("prune", Prune(keep=k)) for k in [*fewer, used])
    yield from (("quantize", Quantize(k=k, seed=seed, engine=engine)) for k in fewer)


def _as_it_is(opened: Streamed, calibration: Calibration, watch: Watch) -> Calibration:
    """The calibration data with the codes that have moved since."""
    tokens = current_tokens(opened, calibration, True, watch)
    tokens_of_first = tokens[opened.model.chosen[0]]
    first = replace(calibration.first, counts=tokens_of_first.counts, codes=tokens_of_first.sample)
    return Calibration(first, tokens, tuple(map(on_cpu, opened.model.books)))
