"""One pass over held-out images: what a model reconstructs, and which codes it uses for that."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codebook_tools import metrics
from codebook_tools.assignment import squared_errors
from codebook_tools.errors import CodebookError
from codebook_tools.images import Images, limited
from codebook_tools.models.model import INPUT_RANGES, Model
from codebook_tools.watch import Watch

RANGE_IMAGES = 64
"""Images that the input range is found out with."""


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
    """mse: per value, images in [0, 1], reconstructions clamped to it; None where nothing was reconstructed. psnr: dB,
    None without any error. ssim: None where the images are too small for its window."""

    split: str
    images: int
    mse: float | None
    psnr: float | None
    ssim: float | None
    codebooks: tuple[CodebookUse, ...]

    @property
    def error(self) -> float:
        """The mse of a measurement that reconstructed images."""
        assert self.mse is not None
        return self.mse


def reconstruct(model: Model, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """images (n, channels, height, width) in [0, 1] -> reconstructions clamped to it, latents (n, dim, *grid), codes.

    Raises NotFiniteError where the network's output is not finite, CodebookError where it is not of the images' shape.
    """
    with torch.no_grad():
        latents = model.encode(images)
        if not bool(torch.isfinite(latents).all()):
            raise NotFiniteError("the encoder's latents are not finite")
        codes = model.assign(latents)
        shown = model.decode(model.embed(codes)).clamp(0, 1)
    if shown.shape != images.shape:
        raise CodebookError(f"decode returns {tuple(shown.shape[1:])} for images of {tuple(images.shape[1:])}")
    if not bool(torch.isfinite(shown).all()):
        raise NotFiniteError("the decoder's reconstructions are not finite")
    return shown, latents, codes


def measure(
    model: Model,
    images: Images,
    *,
    split: str = "test",
    batch: int = 64,
    structure: bool = True,
    reference: float | None = None,
    watch: Watch,
) -> Measurement:
    """Measure a model on all of `images`. structure: with SSIM, which takes longer than the rest on small images.

    reference: the squared distance up to which a latent counts as covered.
    """
    codebook = model.codebook
    counts = torch.zeros(codebook.size, dtype=torch.int64)
    count, latent_count, values, near = 0, 0, 0, 0
    error = distortion = similarity = 0.0
    compared = structure
    for items, pixels in images.batches(batch):
        shown, latents, codes = reconstruct(model, pixels)
        pixels = pixels.to(shown.device)
        rows, flat = latents.movedim(1, -1).flatten(0, -2), codes.flatten()
        counts += torch.bincount(flat, minlength=codebook.size).cpu()
        errors = squared_errors(rows, codebook, flat).double()
        distortion += float(errors.sum())
        near += int((errors <= reference).sum()) if reference is not None else 0
        error += float((shown - pixels).double().square().sum())
        count, latent_count, values = count + len(items), latent_count + len(rows), values + pixels.numel()
        scores = metrics.ssim(pixels, shown) if compared else None
        compared = scores is not None
        similarity += float(scores.double().sum()) if scores is not None else 0.0
        watch.progress(f"measure on {split}", count, len(images))
    if not count:
        raise CodebookError(f"none of the {len(images)} {split} images can be read")
    mse = error / values
    coverage = near / latent_count if reference is not None else None
    use = use_of(model.found.key, codebook.dim, counts, distortion / latent_count, coverage)
    return Measurement(
        split, count, mse, metrics.psnr(mse) if mse else None, similarity / count if compared else None, (use,)
    )


def find_input_range(model: Model, images: Images) -> dict[tuple[float, float], float]:
    """Reconstruction error of a few images in each range that networks are trained on: the lowest is the model's."""
    few = images.subset(limited(images.items, RANGE_IMAGES, seed=0))  # neighbours in name are often alike
    before, errors = model.input_range, {}
    for model.input_range in INPUT_RANGES:
        errors[model.input_range] = measure(model, few, structure=False, watch=Watch()).error
    model.input_range = before
    return errors
