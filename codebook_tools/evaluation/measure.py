"""One pass over held-out images: what a model reconstructs, and which codes it uses for that."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from codebook_tools.data.dataset import Media
from codebook_tools.data.latents import rows_of
from codebook_tools.data.splits import limited
from codebook_tools.errors import CodebookError, NotFiniteError
from codebook_tools.evaluation import metrics
from codebook_tools.evaluation.accumulators import BookSums, Sums, book_sums, exact, no_sums
from codebook_tools.models.model import Model, Pass
from codebook_tools.runtime import distributed
from codebook_tools.runtime.devices import wide
from codebook_tools.runtime.progress import Watch

RANGE_IMAGES = 64
"""Media that the input range is found out with."""


@dataclass(frozen=True)
class CodebookUse:
    """How one codebook is used. latents: assigned. used_10: codes with 10 hits or more. bits: log2 of the perplexity.

    distortion: mean squared distance from a latent to its emitted code, summed over dimensions. coverage: share of the
    latents that are nearer to their code than the reference distance; None without one (coverage.py says which).
    effective_dimension: of the latents, by the participation ratio of their covariance, and of the codes that they are
    replaced by; dimensions_99: how many principal directions hold 99 % of the variance. None where that was not asked.
    """

    key: str
    size: int
    dim: int
    latents: int
    used: int
    usage: float
    used_10: int
    perplexity: float
    bits: float
    top_share: float
    distortion: float
    coverage: float | None
    effective_dimension: float | None = None
    effective_dimension_codes: float | None = None
    dimensions_99: int | None = None
    dimensions_99_codes: int | None = None


def use_of(sums: BookSums) -> CodebookUse:
    """What sums tell of a codebook's use."""
    counts, latents = sums.counts, int(sums.counts.sum())
    return CodebookUse(
        key=sums.key,
        size=len(counts),
        dim=sums.dim,
        latents=latents,
        used=metrics.used(counts),
        usage=metrics.usage(counts),
        used_10=metrics.used(counts, 10),
        perplexity=metrics.perplexity(counts),
        bits=metrics.bits(counts),
        top_share=metrics.top_share(counts),
        distortion=float(sums.error / max(1, latents)),
        coverage=None if sums.near is None else sums.near / max(1, latents),
        **_dimensions(sums, latents),
    )


_DIGITS = 4  # significant ones: in what order sums were added shows in none of them


def _dimensions(sums: BookSums, latents: int) -> dict[str, Any]:
    if sums.moments is None or not latents:
        return {}
    of_latents, of_codes = (metrics.covariance_of_moments(one[0], one[1:], latents) for one in sums.moments)
    return {
        "effective_dimension": float(f"{metrics.participation_ratio(of_latents):.{_DIGITS}g}"),
        "effective_dimension_codes": float(f"{metrics.participation_ratio(of_codes):.{_DIGITS}g}"),
        "dimensions_99": metrics.dimensions_that_hold(of_latents),
        "dimensions_99_codes": metrics.dimensions_that_hold(of_codes),
    }


@dataclass(frozen=True)
class Measurement:
    """mse: per value, images in [0, 1], reconstructions clamped to it, or of the waveform; None where nothing was
    reconstructed. images: or clips; None where there were only latents. psnr: dB, None without any error. ssim: None
    where the images are too small for its window. sharpness: metrics.detail of the reconstructions over that of the
    images, 1 where they are as sharp; None for images without any detail. All three are None where the modality does
    not have them. counts: (size,) int64 of each codebook, how often each code was chosen; none where that was read from
    JSON."""

    split: str
    images: int | None
    mse: float | None
    psnr: float | None
    ssim: float | None
    codebooks: tuple[CodebookUse, ...]
    sharpness: float | None = None
    counts: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """All but the counts, which are as many as there are codes."""
        found = asdict(replace(self, counts=()))
        del found["counts"]
        return found

    @property
    def error(self) -> float:
        """The mse of a measurement that reconstructed images."""
        assert self.mse is not None
        return self.mse


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
    sums = collect(model, images, split=split, batch=batch, structure=structure, references=references, watch=watch)
    return measurement_of(sums, split, model.modality.figures)


def collect(
    model: Model,
    images: Media,
    *,
    split: str,
    batch: int,
    structure: bool = True,
    references: Sequence[float | None] | None,
    watch: Watch,
) -> Sums:
    """What a measurement adds up, over the parts of `images` that the processes see; see `measure`."""
    given = references or [None] * len(model.books)
    books = [(book.key, book.codebook, of) for book, of in zip(model.books, given, strict=True)]
    figures = model.modality.figures if structure else frozenset[str]()
    no_similarity, no_detail = (Fraction(0) if figure in figures else None for figure in ("ssim", "sharpness"))
    of_nothing = tuple(no_sums(*book, moments=True) for book in books)
    total = Sums(0, 0, Fraction(0), no_similarity, of_nothing, no_detail, no_detail)
    parts = images.part[1]
    with distributed.alike(NotFiniteError):
        for items, pixels in images.batches(batch):
            seen = reconstruct(model, pixels)
            pixels = pixels.to(seen.media.device)
            scores = metrics.ssim(pixels, seen.media) if "ssim" in figures else None
            both = (pixels, seen.media)
            detail, shown_detail = map(metrics.detail, both) if "sharpness" in figures else (None, None)
            total += Sums(
                images=len(items),
                values=pixels.numel(),
                error=exact(float(wide(seen.media - pixels).square().sum())),
                similarity=_added(scores),
                books=tuple(
                    book_sums(*book, rows_of(latents), codes.flatten(), moments=True)
                    for book, latents, codes in zip(books, seen.latents, seen.codes, strict=True)
                ),
                detail=_added(detail),
                shown_detail=_added(shown_detail),
            )
            watch.progress(f"measure on {split}", min(parts * total.images, len(images)), len(images))
    return total.unpacked(*map(distributed.summed, total.packed())) if parts > 1 else total


def _added(scores: Tensor | None) -> Fraction | None:
    return None if scores is None else exact(float(wide(scores).sum()))


def measurement_of(sums: Sums, split: str, figures: Collection[str] = ("psnr",)) -> Measurement:
    """What sums say.

    Args:
        sums: Of all data of the split.
        split: Its name.
        figures: Of the modality; without psnr there is none.

    Raises:
        CodebookError: They are of nothing.
    """
    if not sums.images:
        raise CodebookError(f"nothing was measured: none of the {split} data can be read")
    mse = float(sums.error / sums.values)
    return Measurement(
        split=split,
        images=sums.images,
        mse=mse,
        psnr=metrics.psnr(mse) if mse and "psnr" in figures else None,
        ssim=None if sums.similarity is None else float(sums.similarity / sums.images),
        codebooks=tuple(map(use_of, sums.books)),
        sharpness=float(sums.shown_detail / sums.detail) if sums.detail and sums.shown_detail is not None else None,
        counts=tuple(book.counts.cpu() for book in sums.books),
    )


def range_errors(
    model: Model, pixels: Tensor, ranges: Iterable[tuple[float, float]]
) -> dict[tuple[float, float], float]:
    """Reconstruction error of images in each range that the network gives finite numbers in. pixels: (n, channels,
    height, width) in [0, 1]."""
    before, errors = model.input_range, dict[tuple[float, float], float]()
    try:
        for model.input_range in ranges:
            with suppress(NotFiniteError):
                shown = reconstruct(model, pixels).media
                errors[model.input_range] = float((shown - pixels.to(shown.device)).square().mean())
    finally:
        model.input_range = before
    return errors


def find_input_range(model: Model, images: Media) -> dict[tuple[float, float], float]:
    """Reconstruction error of a few images in each range that networks are trained on: the lowest is the model's."""
    few = images.subset(limited(images.items, RANGE_IMAGES, seed=0))  # neighbours in name are often alike
    before, ranges, errors = model.input_range, model.modality.input_ranges, {}
    for model.input_range in ranges:
        errors[model.input_range] = measure(model, few, structure=False, watch=Watch()).error
    model.input_range = before
    return errors
