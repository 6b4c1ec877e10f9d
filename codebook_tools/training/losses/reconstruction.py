"""What a fine-tuning minimises, in units of the data, so that nothing is tuned to a scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from codebook_tools.data.dataset import Media
from codebook_tools.models.model import Book, Model
from codebook_tools.training.losses.entropy import indecision
from codebook_tools.training.recipe import Loss

COMMITMENT = 1.0  # weight of the term that moves latents to codes, in units of their variance


class Seen(NamedTuple):
    """What met a book: latents (n, dim, *grid), their codes (n, *grid), those as the decoder gets them, and itself."""

    latents: Tensor
    codes: Tensor
    quantised: Tensor
    book: Book


@dataclass(frozen=True)
class Scales:
    """Variances of pixels, and of each book's latents, about their means: the units of the losses."""

    pixels: float
    latents: tuple[float, ...]


@dataclass(frozen=True)
class Reconstruction:
    """Reconstruction error over the media's variance, plus COMMITMENT times the squared distance of latents to codes
    over the latents' variance, a mean over the books; and that distance once more where gradients move codes.

    entropy: weight of what latents are undecided about codes (entropy.py), a mean over the books, too."""

    scales: Scales
    kind: Loss
    moves_codes: bool
    entropy: float

    def __call__(self, shown: Tensor, media: Tensor, seen: Sequence[Seen]) -> dict[str, Tensor]:
        """The terms by name, scalars; their sum is what is minimised."""
        terms = {"reconstruction": self.error(shown, media)}
        for scale, (latents, _, quantised, book) in zip(self.scales.latents, seen, strict=True):
            unit_of_loss = scale * len(seen)
            _add(terms, "commitment", COMMITMENT * functional.mse_loss(latents, quantised.detach()) / unit_of_loss)
            if self.moves_codes:
                _add(terms, "codebook", functional.mse_loss(quantised, latents.detach()) / unit_of_loss)
            if self.entropy:
                found = indecision(latents.movedim(1, -1).flatten(0, -2), book.vectors, book.metric)
                _add(terms, "entropy", self.entropy * found / len(seen))
        return terms

    def error(self, shown: Tensor, media: Tensor) -> Tensor:
        """The reconstruction error alone."""
        squared = self.kind == "mse"
        error: Tensor = (functional.mse_loss if squared else functional.l1_loss)(shown, media)
        return error / (self.scales.pixels if squared else self.scales.pixels**0.5)

    def step(self) -> None:
        """Nothing trains beside the model."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """There is nothing to be loaded."""


def _add(terms: dict[str, Tensor], name: str, term: Tensor) -> None:
    terms[name] = terms[name] + term if name in terms else term


def scales_of(model: Model, images: Media) -> Scales:
    """The scales of 512 items."""
    few = images.whole().subset(images.items[:512])
    pixels, latents = list[Tensor](), [list[Tensor]() for _ in model.books]
    with torch.no_grad():
        for _, batch in few.batches(64):
            pixels.append(batch)
            for rows, found in zip(latents, model.pass_through(batch).latents, strict=True):
                rows.append(found.movedim(1, -1).flatten(0, -2).cpu())
    of_pixels = _variance(torch.cat(pixels).movedim(1, -1).flatten(0, -2))
    return Scales(of_pixels, tuple(_variance(torch.cat(rows)) for rows in latents))


def _variance(rows: Tensor) -> float:
    return float(rows.double().var(0, correction=0).mean().clamp(min=1e-12))
