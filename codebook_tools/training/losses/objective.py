"""What a fine-tuning minimises: the objective of a recipe, of one term or of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

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
from codebook_tools.training.losses.reconstruction import Reconstruction, Seen, scales_of
from codebook_tools.training.recipe import FineTune

PERCEPTUAL = 2.0
"""Weight of LPIPS. VQGAN adds it to the absolute error of pixels in [-1, 1], whose deviation in photographs is about a
half; errors here are in deviations."""

Term = Callable[[Tensor, Tensor], Tensor]
"""Of what a model shows, and the media: a scalar."""


@dataclass(frozen=True, eq=False)
class Several:
    """more: further terms by name. adversary: a discriminator that trains along. alone: steps that it
    takes before it is heard."""

    plain: Reconstruction
    more: Mapping[str, Term]
    adversary: Adversary | None = None
    alone: int = 0

    def __call__(self, shown: Tensor, media: Tensor, seen: Sequence[Seen]) -> dict[str, Tensor]:
        """The terms by name, scalars; their sum is what is minimised."""
        terms, more = self.plain(shown, media, seen), self._more(shown, media)
        terms |= more
        if self.adversary:
            heard = self.adversary.steps >= self.alone
            error = sum(more.values(), terms["reconstruction"])
            terms["adversarial"] = self.adversary.term(shown, error) if heard else shown.new_zeros(())
            self.adversary.watch(media, shown)
        return terms

    def error(self, shown: Tensor, media: Tensor) -> Tensor:
        """All that compares pictures; the discriminator does not, and changes its mind."""
        return sum(self._more(shown, media).values(), self.plain.error(shown, media))

    def step(self) -> None:
        """One of the discriminator's."""
        if self.adversary:
            self.adversary.learn()

    def state(self) -> dict[str, Tensor]:
        return self.adversary.state() if self.adversary else {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        if self.adversary:
            self.adversary.load(state)

    def _more(self, shown: Tensor, media: Tensor) -> dict[str, Tensor]:
        return {name: term(shown, media) for name, term in self.more.items()}


def several(plain: Reconstruction, model: Model, recipe: FineTune, pixels: Tensor, seed: int) -> Several:
    """The plain objective and all else that the recipe asks for. pixels: (1, ...), an item of the training data. seed:
    of the discriminator's weights."""
    perceptual, discriminator = judges(model, recipe, pixels, seed)
    more = dict[str, Term]()
    if perceptual:
        more["perceptual"] = lambda shown, media: PERCEPTUAL * perceptual(shown, media)
    if recipe.distill:
        original = Original(model)
        more["distill"] = lambda shown, media: recipe.distill * plain.error(shown, original(media))
    if discriminator is None:
        return Several(plain, more)
    adversary = Adversary(discriminator, last_layer(replace(model, compiled=False), pixels))
    return Several(plain, more, adversary, recipe.settled_from - 1)


def pictures_loss(objective: object, model: Model, validation: Media) -> float | None:
    """What an objective of several terms makes of the validation data; None where the squared error stands for it."""
    if not isinstance(objective, Several):
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
    """The networks that judge pictures, where the recipe asks for them. Raises CodebookError where they cannot."""
    if not (recipe.perceptual or recipe.adversarial):
        return None, None
    if not model.modality.pictures:
        raise CodebookError(f"--perceptual and --adversarial judge images; this model takes {model.modality.many}")
    channels, *sides = pixels.shape[1:]
    perceptual = Perceptual(recipe.perceptual, min(sides), model.device) if recipe.perceptual else None
    discriminator = Discriminator(channels, min(sides), seed).to(model.device) if recipe.adversarial else None
    return perceptual, discriminator


class Objective(Protocol):
    """Terms of a loss, and whatever trains beside the model so that they can be told."""

    def __call__(self, shown: Tensor, media: Tensor, seen: Sequence[Seen]) -> dict[str, Tensor]:
        """The terms by name, scalars, each time the same ones; their sum is what is minimised. shown: what the model
        makes of media, not clamped, with gradients. seen: of each book. Called once for each batch of a step."""

    def step(self) -> None:
        """Train what is beside the model; called after each step of the model's own optimiser."""

    def state(self) -> dict[str, Tensor]:
        """All that `step` changes, for a run that is resumed."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""


def objective_of(model: Model, train: Media, recipe: FineTune, pixels: Tensor, seed: int) -> Objective:
    """The one of a recipe, in the units of the model and the data as they are before the first step. pixels: (1, ...),
    an item of the data. Raises CodebookError where a term has nothing to go by."""
    if recipe.entropy and not all(book.metric.is_distance for book in model.books):
        raise CodebookError("--entropy goes by distances to codes, and here inner products choose them; leave it out")
    scales = distributed.of_first(scales_of(model, train))
    plain = Reconstruction(scales, recipe.loss, recipe.codebook_update == "gradient", recipe.entropy)
    asked = recipe.perceptual or recipe.adversarial or recipe.distill
    return several(plain, model, recipe, pixels, seed) if asked else plain
