"""One pass over held-out images: what a model reconstructs, and which codes it uses for that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from codebook_tools.data.dataset import Media
from codebook_tools.data.splits import limited
from codebook_tools.errors import CodebookError, NotFiniteError
from codebook_tools.evaluation.accumulators import Totals
from codebook_tools.evaluation.figures import Measurement, measurement_of
from codebook_tools.evaluation.one_pass import MediaSource, run_pass
from codebook_tools.models.model import Model, Pass
from codebook_tools.runtime.progress import Watch

RANGE_IMAGES = 64
"""Media that the input range is found out with."""


def reconstruct(model: Model, media: Tensor) -> Pass:
    """One batch through a model: images (n, channels, height, width) in [0, 1], reconstructed clamped to it, or
    waveforms (n, channels, samples), which are not.

    Raises NotFiniteError where the network's output is not finite, CodebookError where it is not of the input's shape.
    """
    with torch.no_grad():
        seen = model.pass_through(media)
    if not all(bool(torch.isfinite(latents).all()) for latents in seen.latents):
        raise NotFiniteError("the encoder's latents are not finite")
    shown = model.modality.clamped(seen.media)
    if shown.shape != media.shape:
        many = model.modality.many
        raise CodebookError(f"decode returns {tuple(shown.shape[1:])} for {many} of {tuple(media.shape[1:])}")
    if not bool(torch.isfinite(shown).all()):
        raise NotFiniteError("the decoder's reconstructions are not finite")
    return replace(seen, media=shown)


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
    """Measure a model on all of `images`, whichever process reads them. structure: with SSIM, which takes longer than
    the rest on small images, and sharpness.

    references: of each book, the squared distance up to which a latent counts as covered.
    """
    totals = totals_of(model, references, structure)
    run_pass(reconstructions(model, images, batch, split), [totals], watch)
    return measurement_of(totals.sums, split, model.modality.figures)


def totals_of(model: Model, references: Sequence[float | None] | None = None, structure: bool = True) -> Totals:
    """What a measurement adds up; see `measure`."""
    references = references or [None] * len(model.books)
    books = [(book.key, book.codebook, reference) for book, reference in zip(model.books, references, strict=True)]
    return Totals(books, measured=True, structure=structure and "ssim" in model.modality.figures)


def reconstructions(model: Model, images: Media, batch: int, split: str = "test") -> MediaSource:
    """What it goes over."""
    return MediaSource(images, partial(reconstruct, model), batch, f"measure on {split}")


def range_errors(
    model: Model, pixels: Tensor, ranges: Iterable[tuple[float, float]]
) -> dict[tuple[float, float], float]:
    """Reconstruction error of images in each range that the network gives finite numbers in. pixels: (n, channels,
    height, width) in [0, 1]."""
    errors = dict[tuple[float, float], float]()
    for bounds in ranges:
        with suppress(NotFiniteError), model.in_range(bounds):
            shown = reconstruct(model, pixels).media
            errors[bounds] = float((shown - pixels.to(shown.device)).square().mean())
    return errors


def find_input_range(model: Model, images: Media) -> dict[tuple[float, float], float]:
    """Reconstruction error of a few images in each range that networks are trained on: the lowest is the model's."""
    few = images.subset(limited(images.items, RANGE_IMAGES, seed=0))  # neighbours in name are often alike
    errors = dict[tuple[float, float], float]()
    for bounds in model.modality.input_ranges:
        with model.in_range(bounds):
            errors[bounds] = measure(model, few, structure=False, watch=Watch()).error
    return errors
