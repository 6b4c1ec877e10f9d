"""The objective of a recipe: the sum of its loss terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from codebook_tools.data.dataset import Media
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.measure import reconstruct
from codebook_tools.models.model import Model
from codebook_tools.runtime import distributed
from codebook_tools.training.losses.adversarial import Adversary, Discriminator, last_layer
from codebook_tools.training.losses.distillation import Original
from codebook_tools.training.losses.perceptual import Perceptual
from codebook_tools.training.losses.reconstruction import Quantized, Reconstruction, scales_of
from codebook_tools.training.recipe import FineTune

PERCEPTUAL = 2.0
"""Weight of LPIPS. VQGAN adds it to the absolute error of pixels in [-1, 1], whose deviation in photographs is about a
half; errors here are in deviations."""

Term = Callable[[Tensor, Tensor], Tensor]
"""Of reconstructions and media, both (n, ...): a scalar."""


@dataclass(frozen=True, eq=False)
class Objective:
    """All terms of a loss, and the discriminator that trains beside the model.

    Attributes:
        plain: Reconstruction, commitment and the like.
        more: Further terms by name, which compare pictures.
        adversary: The discriminator in training; None for none.
        alone: Steps that it trains before the model gets its gradients.
    """

    plain: Reconstruction
    more: Mapping[str, Term]
    adversary: Adversary | None = None
    alone: int = 0

    def __call__(self, reconstruction: Tensor, media: Tensor, outputs: Sequence[Quantized]) -> dict[str, Tensor]:
        """The loss of one batch of a step.

        Args:
            reconstruction: (n, ...), not clamped, with gradients.
            media: (n, ...).
            outputs: One for each book.

        Returns:
            The terms by name, scalars, the same names each time; their sum is minimized.
        """
        terms, more = self.plain(reconstruction, media, outputs), self._more(reconstruction, media)
        terms |= more
        if self.adversary:
            zero = reconstruction.new_zeros(())
            error = sum(more.values(), terms["reconstruction"])
            counts = self.adversary.steps >= self.alone
            terms["adversarial"] = self.adversary.term(reconstruction, error) if counts else zero
            self.adversary.watch(media, reconstruction)
        return terms

    def error(self, reconstruction: Tensor, media: Tensor) -> Tensor:
        """The terms that compare pictures, a scalar; without the discriminator's, which changes as it trains."""
        return sum(self._more(reconstruction, media).values(), self.plain.error(reconstruction, media))

    def step(self) -> None:
        """Train the discriminator, after a step of the model's own optimizer."""
        if self.adversary:
            self.adversary.learn()

    def state(self) -> dict[str, Tensor]:
        """All that `step` changes, by name."""
        return self.adversary.state() if self.adversary else {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        if self.adversary:
            self.adversary.load(state)

    def _more(self, reconstruction: Tensor, media: Tensor) -> dict[str, Tensor]:
        return {name: term(reconstruction, media) for name, term in self.more.items()}


def validation_loss(objective: Objective, model: Model, validation: Media) -> float | None:
    """Mean of `Objective.error` over the validation items; None where the squared error stands for it."""
    if not (objective.more or objective.adversary):
        return None
    total = torch.zeros(2, dtype=torch.float64)
    for items, media in validation.batches(64):
        media = media.to(model.device)
        with torch.no_grad():
            error = objective.error(reconstruct(model, media).media, media)
        total += torch.tensor([float(error) * len(items), len(items)])
    summed = distributed.summed(total) if validation.part[1] > 1 else total
    return float(summed[0] / summed[1])


def judges(
    model: Model, recipe: FineTune, pixels: Tensor, seed: int = 0
) -> tuple[Perceptual | None, Discriminator | None]:
    """The networks of the perceptual and the adversarial term.

    Args:
        model: The model that trains.
        recipe: Says which terms there are.
        pixels: (1, ...), an item of the training data.
        seed: Of the discriminator's weights.

    Returns:
        Both networks, None for one that the recipe does not ask for.

    Raises:
        CodebookError: The items are no images, or too small, or LPIPS' weights are missing.
    """
    if not (recipe.perceptual or recipe.adversarial):
        return None, None
    if not model.modality.pictures:
        raise CodebookError(f"--perceptual and --adversarial judge images; this model takes {model.modality.many}")
    channels, *sides = pixels.shape[1:]
    perceptual = Perceptual(recipe.perceptual, min(sides), model.device) if recipe.perceptual else None
    discriminator = Discriminator(channels, min(sides), seed).to(model.device) if recipe.adversarial else None
    return perceptual, discriminator


def objective_of(model: Model, train: Media, recipe: FineTune, pixels: Tensor, seed: int) -> Objective:
    """The objective of a recipe, in units of the model and the data before the first step.

    Args:
        model: The model that trains.
        train: Items for the units.
        recipe: The settings.
        pixels: (1, ...), an item of the training data.
        seed: Of the discriminator's weights.

    Raises:
        CodebookError: A term cannot be computed for this model or data.
    """
    if recipe.entropy and not all(book.metric.is_distance for book in model.books):
        raise CodebookError("--entropy goes by distances to codes, and here inner products choose them; leave it out")
    scales = distributed.of_first(scales_of(model, train))
    to_latents = recipe.codebook_update == "gradient" and not recipe.decoder_moves_codes
    plain = Reconstruction(scales, recipe.loss, to_latents, recipe.entropy)
    perceptual, discriminator = judges(model, recipe, pixels, seed)
    more = dict[str, Term]()
    if perceptual:
        more["perceptual"] = lambda reconstruction, media: PERCEPTUAL * perceptual(reconstruction, media)
    if recipe.distill:
        original = Original(model)
        more["distill"] = lambda output, media: recipe.distill * plain.error(output, original(media))
    if discriminator is None:
        return Objective(plain, more)
    adversary = Adversary(discriminator, last_layer(replace(model, compiled=False), pixels))
    return Objective(plain, more, adversary, recipe.settled_from - 1)
