"""Reconstruction error and commitment, in units of the data's variance, so that no weight depends on a scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from codebook_tools.data.dataset import Media
from codebook_tools.models.model import Book, Model
from codebook_tools.training.losses.entropy import indecision
from codebook_tools.training.recipe import Loss

COMMITMENT = 0.25  # weight of the term that moves latents to codes, in units of their variance


class Quantized(NamedTuple):
    """What one book made of a batch.

    Attributes:
        latents: (n, dim, *grid).
        codes: (n, *grid) int64.
        quantized: (n, dim, *grid), the codes as the decoder gets them.
        book: The book.
    """

    latents: Tensor
    codes: Tensor
    quantized: Tensor
    book: Book


@dataclass(frozen=True)
class Scales:
    """Variances about the mean, a mean over dimensions: the units of the losses.

    Attributes:
        pixels: Of the media.
        latents: Of each book's latents.
    """

    pixels: float
    latents: tuple[float, ...]


@dataclass(frozen=True)
class Reconstruction:
    """Reconstruction error, commitment, the codebook loss where it moves codes, and entropy.

    Attributes:
        scales: The units.
        kind: Of the reconstruction error.
        moves_codes: Whether the codebook loss moves codes to their latents.
        entropy: Weight of the entropy term (entropy.py).
    """

    scales: Scales
    kind: Loss
    moves_codes: bool
    entropy: float

    def __call__(self, reconstruction: Tensor, media: Tensor, outputs: Sequence[Quantized]) -> dict[str, Tensor]:
        """The terms by name, scalars; terms of the codebooks are means over them."""
        terms = {"reconstruction": self.error(reconstruction, media)}
        for scale, (latents, _, quantized, book) in zip(self.scales.latents, outputs, strict=True):
            unit_of_loss = scale * len(outputs)
            _add(terms, "commitment", COMMITMENT * functional.mse_loss(latents, quantized.detach()) / unit_of_loss)
            if self.moves_codes:
                _add(terms, "codebook", functional.mse_loss(quantized, latents.detach()) / unit_of_loss)
            if self.entropy:
                entropy = indecision(latents.movedim(1, -1).flatten(0, -2), book.vectors, book.metric)
                _add(terms, "entropy", self.entropy * entropy / len(outputs))
        return terms

    def error(self, reconstruction: Tensor, media: Tensor) -> Tensor:
        """The reconstruction error alone, a scalar."""
        squared = self.kind == "mse"
        error: Tensor = (functional.mse_loss if squared else functional.l1_loss)(reconstruction, media)
        return error / (self.scales.pixels if squared else self.scales.pixels**0.5)


def _add(terms: dict[str, Tensor], name: str, term: Tensor) -> None:
    terms[name] = terms[name] + term if name in terms else term


def scales_of(model: Model, images: Media) -> Scales:
    """The scales of the first 512 items."""
    few = images.whole().subset(images.items[:512])
    pixels, latents = list[Tensor](), [list[Tensor]() for _ in model.books]
    with torch.no_grad():
        for _, batch in few.batches(64):
            pixels.append(batch.float().movedim(1, -1).flatten(0, -2))
            for rows, grid in zip(latents, model.pass_through(batch).latents, strict=True):
                rows.append(grid.movedim(1, -1).flatten(0, -2).cpu())
    return Scales(_variance(torch.cat(pixels)), tuple(_variance(torch.cat(rows)) for rows in latents))


def _variance(rows: Tensor) -> float:
    return float(rows.double().var(0, correction=0).mean().clamp(min=1e-12))
