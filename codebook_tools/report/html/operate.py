"""The page of a surgery, a fine-tuning or a measurement: figures by phase, reconstructions, usage and training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from codebook_tools.evaluation.figures import STAGES, Measurement, codes_used, stage_rows
from codebook_tools.report.html.curves import draw_panels
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
    stages = {STAGES[name]: stage for name, stage in result.stages.items() if stage}
    if not stages:
        return
    head, *rows = stage_rows(result.stages, result.kept)
    images = result.before.images if result.before else None
    notes = [f"On {images:,} test images."] if images else []
    note = " ".join([*notes, "* is what was kept."] if result.kept else notes)
    yield Table("Stage by stage", head, tuple(rows), note)
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
        rows[image.rank] = [Picture(image.original, f"{image.name}, the original", "the original")]
        for phase, picture in image.stages.items():
            name = STAGES.get(phase, phase) if len(image.stages) > 1 else "reconstructed"
            caption = f"{name}, mse {image.errors[phase]:.5f}"
            rows[image.rank].append(Picture(picture, f"{image.name}, {name}", caption))
    names = ", ".join(f"{image.rank}: {image.name}" for image in images)
    return Gallery("The worst, the median and the best image", rows, f"By the error of the last one shown. {names}.")


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
        for name, hits in falling.items():
            axes.step(range(1, len(hits) + 1), hits, where="mid", label=name)
        axes.set_yscale("symlog", linthresh=1)
        axes.set(xlabel="codes, the most used first", ylabel="hits", ylim=(0, None), xlim=(0.5, longest + 0.5))
        axes.legend()

    used = ", ".join(f"{name}: {sum(hit > 0 for hit in hits)} of {len(hits)}" for name, hits in falling.items())
    columns: dict[str, Sequence[object]] = {"rank": range(1, longest + 1)}
    columns |= {name: [*hits, *[""] * (longest - len(hits))] for name, hits in falling.items()}
    return Plot(title, f"Hits of each code in falling order, on a log axis. Codes in use {used}.", draw, columns)


def books_plot(stages: Mapping[str, Measurement]) -> Plot:
    """The share of codes in use in each of several codebooks. stages: measurements by name of the phase."""
    shares = {name: [use.usage for use in stage.codebooks] for name, stage in stages.items()}
    keys = [use.key for use in next(iter(stages.values())).codebooks]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name, share in shares.items():
            axes.plot(range(1, len(share) + 1), share, ".-", label=name)
        axes.set(xlabel="codebook", ylabel="share of codes in use", ylim=(0, 1.05))
        axes.legend()

    lowest = ", ".join(f"{name}: {min(share):.1%} to {max(share):.1%}" for name, share in shares.items())
    description = f"The share of codes in use in each of {len(keys)} codebooks; {lowest}."
    return Plot("Codes in use, codebook by codebook", description, draw, {"codebook": keys, **shares})


def trace_plot(title: str, trace: Sequence[TracePoint]) -> Plot:
    """A fine-tuning, evaluation step by evaluation step."""
    points = [asdict(point) for point in trace]
    first, last = trace[0], trace[-1]
    description = (
        f"Codes in use, perplexity, distortion and validation error over {last.step} steps: "
        f"used {first.used} to {last.used}, validation error {first.validation_mse:.6f} to {last.validation_mse:.6f}."
    )
    return Plot(
        title,
        description,
        lambda figure: draw_panels({"": points}, figure),
        {name: [point[name] for point in points] for name in points[0]},
        (11, 2.6),
        "Step 0 is right after the surgery: what is wrong there was installed wrongly, the rest collapsed later.",
    )
