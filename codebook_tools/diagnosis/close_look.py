"""The outputs of a model on a few items: latents as grids, reconstruction errors, and the best input range."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codebook_tools.data.dataset import Media
from codebook_tools.data.splits import shuffled
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.coverage import POINTS
from codebook_tools.models.from_latents import LatentsModel
from codebook_tools.models.model import Model

CLEARLY = 1.1
"""Times the error of one input range that the next one's must be for the first to be surely the network's own."""

_CLOSELY = 256  # items at most
_RANGED = 64  # images that tell the input range
_KNOWN = 0.5  # of the images' variance: a network that leaves more of it knows no range


@dataclass(frozen=True, eq=False)
class Close:
    """A model's outputs on a few items.

    Attributes:
        latents: (n, dim, *grid) of each codebook.
        mse: Of the reconstructions, per value; None where nothing was reconstructed.
        flat_mse: Of items that are their channels' means everywhere, per value; None without items.
    """

    latents: tuple[Tensor, ...]
    mse: float | None = None
    flat_mse: float | None = None


def few_of(model: Model, media: Media, seed: int) -> Media:
    """Items drawn by seed, so many that every codebook gets POINTS latents, _CLOSELY at most.

    Raises:
        CodebookError: None of them can be read.
    """
    drawn = media.subset(shuffled(media.items, seed, _CLOSELY)).whole()  # every process looks at all of them
    first = next((pixels for _, pixels in drawn.batches(1)), None)
    if first is None:
        raise CodebookError(f"none of {len(drawn)} {model.modality.many} can be read")
    with torch.no_grad():
        positions = min(latents[0, 0].numel() for latents in model.pass_through(first).latents)
    return drawn.subset(drawn.items[: -(-POINTS // positions)])


def look(model: Model, media: Media, batch: int, bounds: tuple[float, float] | None = None) -> Close:
    """Run the model as it is on all of media.

    Args:
        model: In any state.
        media: The items.
        batch: Items at a time.
        bounds: The input range; None for the model's own.
    """
    errors, values = 0.0, 0
    sums = squares = torch.zeros(1, dtype=torch.float64)
    batches = []
    with model.in_range(bounds or model.input_range):
        for _, pixels in media.batches(batch):
            with torch.no_grad():
                output = model.pass_through(pixels)
            batches.append([latents.cpu() for latents in output.latents])
            errors += _squares(model, output.media, pixels)
            values += pixels.numel()
            channels = pixels.cpu().double().movedim(1, 0).flatten(1)
            sums, squares = sums + channels.sum(1), squares + channels.square().sum(1)
    each = max(values, 1) / len(sums)
    flat = float((squares / each - (sums / each).square()).clamp(min=0).mean())
    return Close(tuple(torch.cat(stage) for stage in zip(*batches, strict=True)), errors / max(values, 1), flat)


def look_at_rows(model: LatentsModel, rows: Tensor) -> Close:
    """Let rows of files (n, dim) walk through the model as it is."""
    with torch.no_grad():
        return Close(tuple(latents.cpu() for latents in model.pass_through(rows).latents))


def range_errors(model: Model, media: Media, batch: int, seed: int) -> dict[tuple[float, float], float]:
    """Reconstruction error of a few images by input range, without quantization, over the images' variance.

    The error is then the network's alone: no codebook, however wrong, contributes to it. Empty where there is only one
    range.
    """
    ranges = model.modality.input_ranges
    if len(ranges) == 1:
        return {}
    few = media.subset(shuffled(media.items, seed)[:_RANGED]).whole()
    errors = dict[tuple[float, float], float]()
    pixels = torch.cat([pixels for _, pixels in few.batches(batch)])
    variance = float((pixels - pixels.mean((0, 2, 3), keepdim=True)).double().square().mean())

    def untouched(stage: int, latents: Tensor) -> Tensor:
        return model.books[stage].metric.emit(latents.movedim(1, -1)).movedim(-1, 1)

    for bounds in ranges:
        with torch.no_grad(), model.in_range(bounds):
            squares = sum(
                (_squares(model, model.run(part, untouched), part) for part in torch.split(pixels, batch)), 0.0
            )
        errors[bounds] = squares / pixels.numel() / max(variance, 1e-30)
    return errors


def recognized_range(errors: dict[tuple[float, float], float], otherwise: tuple[float, float]) -> tuple[float, float]:
    """The range that is surely the network's, by its errors; else `otherwise`."""
    best, second, *_ = sorted(errors, key=lambda bounds: errors[bounds])
    return best if errors[best] <= _KNOWN and errors[second] > CLEARLY * errors[best] else otherwise


def rows_of(latents: Tensor, seed: int) -> Tensor:
    """(n, dim): latents (images, dim, *grid), in an order drawn by seed."""
    rows = latents.movedim(1, -1).flatten(0, -2)
    return shuffled_rows(rows, seed)


def shuffled_rows(rows: Tensor, seed: int) -> Tensor:
    """At most POINTS of rows (n, dim), in an order that depends on how many there are and on the seed."""
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:POINTS]]


def _squares(model: Model, reconstructions: Tensor, originals: Tensor) -> float:
    """Sum of squared errors."""
    reconstructions = model.modality.clamped(reconstructions)
    return float((reconstructions.cpu() - originals.cpu()).double().square().sum())
