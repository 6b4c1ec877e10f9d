"""What a fine-tuning minimises, as the loop sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from codebook_tools.codebook import Lookup
from codebook_tools.data.dataset import Media
from codebook_tools.errors import CodebookError
from codebook_tools.losses import Reconstruction, Seen, scales_of
from codebook_tools.models.model import Model
from codebook_tools.runtime import distributed
from codebook_tools.training.recipe import Recipe
from codebook_tools.training.several import several


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


def objective_of(model: Model, train: Media, recipe: Recipe, pixels: Tensor, seed: int) -> Objective:
    """The one of a recipe, in the units of the model and the data as they are before the first step. pixels: (1, ...),
    an item of the data. Raises CodebookError where a term has nothing to go by."""
    if recipe.entropy and any(book.lookup is Lookup.DOT for book in model.books):
        raise CodebookError("--entropy goes by distances to codes, and here inner products choose them; leave it out")
    scales = distributed.of_first(scales_of(model, train))
    plain = Reconstruction(scales, recipe.loss, recipe.codebook_update == "gradient", recipe.entropy)
    asked = recipe.perceptual or recipe.adversarial or recipe.distill
    return several(plain, model, recipe, pixels, seed) if asked else plain
