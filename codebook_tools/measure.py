"""One pass over held-out images: what a model reconstructs, and which codes it uses for that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from codebook_tools import metrics, processes
from codebook_tools.assignment import squared_errors
from codebook_tools.codebook import Codebook
from codebook_tools.errors import CodebookError
from codebook_tools.media import Media
from codebook_tools.models.model import INPUT_RANGES, Model, Pass
from codebook_tools.splits import limited
from codebook_tools.watch import Watch

RANGE_IMAGES = 64
"""Media that the input range is found out with."""


class NotFiniteError(CodebookError):
    """What a network returns holds a NaN or an infinity."""


@dataclass(frozen=True)
class CodebookUse:
    """How one codebook is used. latents: assigned. used_10: codes with 10 hits or more. bits: log2 of the perplexity.

    distortion: mean squared distance from a latent to its emitted code, summed over dimensions. coverage: share of the
    latents that are nearer to their code than the reference distance; None without one (coverage.py says which).
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


def use_of(key: str, dim: int, counts: Tensor, distortion: float, coverage: float | None) -> CodebookUse:
    """All that counts tell of a codebook's use. counts: (size,) int64."""
    return CodebookUse(
        key=key,
        size=len(counts),
        dim=dim,
        latents=int(counts.sum()),
        used=metrics.used(counts),
        usage=metrics.usage(counts),
        used_10=metrics.used(counts, 10),
        perplexity=metrics.perplexity(counts),
        bits=metrics.bits(counts),
        top_share=metrics.top_share(counts),
        distortion=distortion,
        coverage=coverage,
    )


@dataclass(frozen=True)
class Measurement:
    """mse: per value, images in [0, 1], reconstructions clamped to it, or of the waveform; None where nothing was
    reconstructed. images: or clips; None where there were only latents. psnr: dB, None without any error. ssim: None
    for waveforms, and where the images are too small for its window."""

    split: str
    images: int | None
    mse: float | None
    psnr: float | None
    ssim: float | None
    codebooks: tuple[CodebookUse, ...]

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
    shown = seen.media.clamp(0, 1) if model.takes == "images" else seen.media
    if shown.shape != media.shape:
        raise CodebookError(f"decode returns {tuple(shown.shape[1:])} for {model.takes} of {tuple(media.shape[1:])}")
    if not bool(torch.isfinite(shown).all()):
        raise NotFiniteError("the decoder's reconstructions are not finite")
    return replace(seen, media=shown)


class Tally:
    """What is counted of one codebook. reference: the squared distance up to which a latent counts as covered."""

    def __init__(self, key: str, codebook: Codebook, reference: float | None) -> None:
        self.key, self.codebook, self.reference = key, codebook, reference
        self.counts = torch.zeros(codebook.size, dtype=torch.int64)
        self.latents = self.near = 0
        self.distortion = 0.0

    def add(self, rows: Tensor, codes: Tensor) -> None:
        """rows: (n, dim) latents, and their codes, (n,)."""
        self.counts += torch.bincount(codes, minlength=self.codebook.size).cpu()
        errors = squared_errors(rows, self.codebook, codes).double()
        self.distortion += float(errors.sum())
        self.near += int((errors <= self.reference).sum()) if self.reference is not None else 0
        self.latents += len(rows)

    def together(self) -> None:
        """Add what other processes counted on their parts."""
        self.counts = processes.summed(self.counts)
        self.latents = int(self.counts.sum())
        sums = torch.tensor([self.distortion, self.near], dtype=torch.float64)
        self.distortion, self.near = processes.summed(sums).tolist()

    def use(self) -> CodebookUse:
        coverage = self.near / self.latents if self.reference is not None else None
        return use_of(self.key, self.codebook.dim, self.counts, self.distortion / self.latents, coverage)


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
    """Measure a model on all of `images`; where they are a part, with what all processes found on theirs.

    structure: with SSIM, which takes longer than the rest on small images. references: of each book, the squared
    distance up to which a latent counts as covered.
    """
    given = references or [None] * len(model.books)
    tallies = [Tally(book.key, book.codebook, of) for book, of in zip(model.books, given, strict=True)]
    count, values = 0, 0
    error = similarity = 0.0
    compared = structure and model.takes == "images"
    parts = images.part[1]
    with processes.alike(NotFiniteError):
        for items, pixels in images.batches(batch):
            seen = reconstruct(model, pixels)
            pixels = pixels.to(seen.media.device)
            for tally, latents, codes in zip(tallies, seen.latents, seen.codes, strict=True):
                tally.add(latents.movedim(1, -1).flatten(0, -2), codes.flatten())
            error += float((seen.media - pixels).double().square().sum())
            count, values = count + len(items), values + pixels.numel()
            scores = metrics.ssim(pixels, seen.media) if compared else None
            compared = scores is not None
            similarity += float(scores.double().sum()) if scores is not None else 0.0
            watch.progress(f"measure on {split}", min(count * parts, len(images)), len(images))
    if parts > 1:
        sums = processes.summed(torch.tensor([count, values, error, similarity, not compared], dtype=torch.float64))
        count, values, compared = int(sums[0]), int(sums[1]), not sums[4]
        error, similarity = sums[2:4].tolist()
        for tally in tallies:
            tally.together()
    if not count:
        raise CodebookError(f"none of the {len(images)} {split} {model.takes} can be read")
    mse = error / values
    uses = tuple(tally.use() for tally in tallies)
    return Measurement(
        split, count, mse, metrics.psnr(mse) if mse else None, similarity / count if compared else None, uses
    )


def find_input_range(model: Model, images: Media) -> dict[tuple[float, float], float]:
    """Reconstruction error of a few images in each range that networks are trained on: the lowest is the model's."""
    few = images.subset(limited(images.items, RANGE_IMAGES, seed=0))  # neighbours in name are often alike
    before, errors = model.input_range, {}
    for model.input_range in INPUT_RANGES:
        errors[model.input_range] = measure(model, few, structure=False, watch=Watch()).error
    model.input_range = before
    return errors
