"""Measurement of a model on held-out data in one pass, and the search for its input range."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from codebook_tools.data.dataset import Media
from codebook_tools.data.rows import all_finite
from codebook_tools.data.splits import limited
from codebook_tools.errors import CodebookError, NotFiniteError
from codebook_tools.evaluation.accumulators import Totals
from codebook_tools.evaluation.figures import Measurement, measurement_of
from codebook_tools.evaluation.one_pass import MediaSource, run_pass
from codebook_tools.models.model import Model, Pass
from codebook_tools.runtime.progress import Watch

Range = tuple[float, float]
"""Lowest and highest value of a network's input."""

RANGE_IMAGES = 64
"""Images that the input range is determined with."""


def reconstruct(model: Model, media: Tensor) -> Pass:
    """Pass one batch through a model.

    Args:
        model: In evaluation mode.
        media: (n, ...): images in [0, 1], waveforms, or arrays.

    Returns:
        The pass, with reconstructions clamped to the bounds of the modality.

    Raises:
        NotFiniteError: Latents or reconstructions are not finite.
        CodebookError: Reconstructions have another shape than `media`.
    """
    with torch.no_grad():
        result = model.pass_through(media)
    if not all(map(all_finite, result.latents)):
        raise NotFiniteError("the encoder's latents are not finite")
    reconstructed = model.modality.clamped(result.media)
    if reconstructed.shape != media.shape:
        shape, many = tuple(reconstructed.shape[1:]), model.modality.many
        wanted = tuple(media.shape[1:])
        raise CodebookError(f"decode returns {shape} for {many} of {wanted}: give sides that the stride divides")
    if not all_finite(reconstructed):
        raise NotFiniteError("the decoder's reconstructions are not finite")
    return replace(result, media=reconstructed)


def measure(
    model: Model,
    images: Media,
    *,
    split: str = "test",
    batch: int = 64,
    structure: bool = True,
    references: Sequence[float | None] | None = None,
    watch: Watch,
) -> Measurement:
    """Measure a model on all of the data, of which each process may read a part.

    Args:
        model: The model.
        images: Images or clips.
        split: Name of the split.
        batch: Items per batch.
        structure: Whether figures beside the error are computed; on small images SSIM takes longer than the rest.
        references: Squared distance of each codebook up to which a latent counts as covered.
        watch: Is told the progress.

    Raises:
        CodebookError: As `reconstruct`, or no item can be read.
    """
    totals = totals_of(model, references, structure)
    run_pass(reconstructions(model, images, batch, split), [totals], watch)
    return measurement_of(totals.sums, split, model.modality.figures)


def totals_of(model: Model, references: Sequence[float | None] | None = None, structure: bool = True) -> Totals:
    """The accumulator of a measurement; see `measure` for the arguments."""
    references = references or [None] * len(model.books)
    books = [(book.key, book.codebook, reference) for book, reference in zip(model.books, references, strict=True)]
    return Totals(books, measured=True, figures=model.modality.figures if structure else ())


def reconstructions(model: Model, images: Media, batch: int, split: str = "test") -> MediaSource:
    """The batches of a measurement; see `measure` for the arguments."""
    return MediaSource(images, partial(reconstruct, model), batch, f"measure on {split}")


def range_errors(model: Model, pixels: Tensor, ranges: Iterable[Range]) -> dict[Range, float]:
    """Mean squared error of one batch in several input ranges.

    Args:
        model: Its input range is unchanged afterwards.
        pixels: (n, channels, height, width) in [0, 1].
        ranges: Lowest and highest input value of each.

    Returns:
        The error by range; ranges in which the network's output is not finite are left out.
    """
    errors = dict[Range, float]()
    for bounds in ranges:
        with suppress(NotFiniteError), model.in_range(bounds):
            reconstructed = reconstruct(model, pixels).media
            errors[bounds] = float((reconstructed - pixels.to(reconstructed.device)).square().mean())
    return errors


def find_input_range(model: Model, images: Media) -> dict[Range, float]:
    """Mean squared error of RANGE_IMAGES images in each input range of the modality; the lowest is the model's own."""
    few = images.subset(limited(images.items, RANGE_IMAGES, seed=0))  # drawn, as neighbors in name are often alike
    errors = dict[Range, float]()
    for bounds in model.modality.input_ranges:
        with model.in_range(bounds):
            errors[bounds] = measure(model, few, structure=False, watch=Watch()).error
    return errors
