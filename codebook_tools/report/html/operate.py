"""The page of a surgery, a fine-tuning or a measurement: figures by phase, reconstructions, usage and training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import torch

from codebook_tools.evaluation.figures import STAGES, Measurement, codes_used
from codebook_tools.evaluation.tables import stage_rows
from codebook_tools.report.html.axes import plain_counts
from codebook_tools.report.html.curves import PANELS, draw_panel
from codebook_tools.report.html.page import Gallery, Page, Part, Picture, Plot, Table
from codebook_tools.report.html.result_page import result_page
from codebook_tools.training.state import TracePoint
from codebook_tools.workflows.gallery import GalleryImage
from codebook_tools.workflows.result import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def operated_page(result: Result, command: str, more: Sequence[Part] = ()) -> Page:
    """The page of a surgery, a fine-tuning or a measurement. more: parts on the model that was written."""
    kept = result.kept_stage if result.kept else None
    sentence = headline(f"{result.command} of {result.model}", result.before, kept)
    return result_page(result, sentence, [*_parts(result), *more], command)


def headline(what: str, before: Measurement | None, kept: Measurement | None) -> str:
    """Summarize a surgery in a sentence.

    Args:
        what: Stands for it where nothing was measured before.
        before: Measured before the surgery.
        kept: Measured of what the file holds; None where nothing was written.
    """
    if before is None:
        return what
    used, size = codes_used(before)
    sentence = f"{used} of {size} codes were used, {used / size:.1%} of the codebook"
    if kept is None:
        return f"{sentence}."
    if kept is before:
        return f"{sentence}; nothing lowered the error, and the model was left as it is."
    return f"{sentence}; now {' of '.join(map(str, codes_used(kept)))}{_change(before, kept)}."


def _change(before: Measurement, kept: Measurement) -> str:
    if not before.mse or kept.mse is None:
        return ""
    change = kept.mse / before.mse - 1
    if kept.mse == before.mse:
        return ", and no reconstruction changed in error"
    return f", and the error {'fell' if change < 0 else 'rose'} by {abs(change):.{0 if abs(change) >= 0.01 else 2}%}"


def _parts(result: Result) -> Iterator[Part]:
    stages = {STAGES[name] if result.kept else "test data": stage for name, stage in result.stages.items() if stage}
    if not stages:
        return
    head, *rows = stage_rows(result.stages, result.kept)
    items = result.before.images if result.before else None
    notes = [f"On {items:,} test items."] if items else []
    note = " ".join([*notes, "* marks the state that the file holds."] if result.kept else notes)
    title = "Before, after surgery and after fine-tuning" if len(stages) > 2 else "Before and after"
    yield Table(title if result.kept else "Figures", head, tuple(rows), note)
    if result.gallery:
        yield gallery(result.gallery)
    if any(len(stage.codebooks) > 1 for stage in stages.values()):
        yield books_plot(stages)
    elif all(stage.counts for stage in stages.values()):
        yield usage_plot("How often codes are used", {name: stage.counts[0] for name, stage in stages.items()})
    if len(result.trace) > 1:
        yield trace_plot("The fine-tuning, step by step", result.trace)


def gallery(images: Sequence[GalleryImage]) -> Gallery:
    """Test images, each with its reconstructions by phase, a row each."""
    rows = {}
    for image in images:
        pictures = image.pictures
        row = [Picture(pictures.pop("original"), f"{image.name}, the original", "the original")]
        for phase, picture in pictures.items():
            name = STAGES.get(phase, phase) if len(image.stages) > 1 else "reconstructed"
            row.append(Picture(picture, f"{image.name}, {name}", f"{name}, mse {image.errors[phase]:.5f}"))
        rows[f"{image.rank}: {image.name}"] = row
    wide = any(picture.aspect > _WIDE for row in rows.values() for picture in row)
    title, note = "The worst, the median and the best test item", "Ordered by the error after the last phase."
    return Gallery(title, rows, note, _HEIGHT if wide else None)


_WIDE, _HEIGHT = 2, 3.4  # width over height of a picture, from which it has that height in rem


def usage_plot(title: str, counts: Mapping[str, torch.Tensor]) -> Plot:
    """Assignments of each code, the most used first, on a log axis.

    Args:
        title: Of the plot.
        counts: (size,) by name of the phase; the sizes may differ.
    """
    falling = {name: hits.sort(descending=True).values.tolist() for name, hits in counts.items()}
    longest = max(map(len, falling.values()))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (name, hits) in enumerate(falling.items()):
            width = 1.2 + 1.3 * (len(falling) - 1 - i)  # what a later line covers stays visible beside it
            axes.step(range(1, len(hits) + 1), hits, where="mid", label=name, linewidth=width)
        axes.set_yscale("symlog", linthresh=1)
        axes.set(xlabel="codes, the most used first", ylabel="assignments", ylim=(0, None), xlim=(0.5, longest + 0.5))
        plain_counts(axes.yaxis)
        axes.legend()

    used = ", ".join(f"{name}: {sum(hit > 0 for hit in hits)} of {len(hits)}" for name, hits in falling.items())
    columns: dict[str, Sequence[object]] = {"rank": range(1, longest + 1)}
    columns |= {name: [*hits, *[""] * (longest - len(hits))] for name, hits in falling.items()}
    description = f"Assignments of each code in falling order, on a log axis. Codes in use {used}."
    return Plot(title, description, (draw,), columns)


def books_plot(stages: Mapping[str, Measurement]) -> Plot:
    """The share of codes in use in each of several codebooks. stages: measurements by name of the phase."""
    shares = {name: [use.usage for use in stage.codebooks] for name, stage in stages.items()}
    keys = [use.key for use in next(iter(stages.values())).codebooks]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name, share in shares.items():
            axes.plot(range(1, len(share) + 1), share, ".-", label=name)
        axes.set(xlabel="codebook", ylabel="share of codes in use", ylim=(0, 1.05))
        axes.locator_params(axis="x", integer=True)
        axes.legend()

    lowest = ", ".join(f"{name}: {min(share):.1%} to {max(share):.1%}" for name, share in shares.items())
    description = f"The share of codes in use in each of {len(keys)} codebooks; {lowest}."
    return Plot("Codes in use, codebook by codebook", description, (draw,), {"codebook": keys, **shares})


def trace_plot(title: str, trace: Sequence[TracePoint]) -> Plot:
    """A fine-tuning, evaluation step by evaluation step."""
    points = [asdict(point) for point in trace]
    first, last = trace[0], trace[-1]
    description = (
        f"Codes in use, perplexity, distortion and validation error over {last.step} steps: "
        f"used {first.used} to {last.used}, validation error {first.validation_mse:.6f} to {last.validation_mse:.6f}."
    )

    def draw(key: str, figure: Figure) -> None:
        draw_panel({"": points}, key, figure.subplots())

    return Plot(
        title,
        description,
        [partial(draw, key) for key in PANELS],
        {name: [point[name] for point in points] for name in points[0]},
        note="Step 0 is right after the surgery, before any training.",
    )
