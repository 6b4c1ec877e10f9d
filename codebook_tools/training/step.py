"""All that moves in a fine-tuning, and one step of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from codebook_tools import processes
from codebook_tools.errors import CodebookError
from codebook_tools.losses import Seen
from codebook_tools.media import Media
from codebook_tools.models.model import Model
from codebook_tools.quantiser import REVIVE_EVERY, Quantiser
from codebook_tools.trainable import set_trainable, trained_names, written_names
from codebook_tools.training.batches import Batches
from codebook_tools.training.objective import objective_of
from codebook_tools.training.recipe import Recipe
from codebook_tools.training.schedule import rate
from codebook_tools.training.together import run_together

REVIVE_UNTIL = 0.9  # of the run: the last codes placed need time to settle

GROUPS = {"all": ("encoder", "decoder"), "decoder": ("decoder",), "none": ()}


class Training:
    """A model in training: its parameters and their optimiser, its codes, the batches that are to come.

    counts: (size,) of each book, where the moving average starts. Raises CodebookError where nothing can be trained.
    """

    def __init__(self, model: Model, train: Media, recipe: Recipe, counts: Sequence[Tensor], seed: int) -> None:
        first, pixels = train.load(train.items[: recipe.batch_size])
        if not first:
            raise CodebookError(f"none of the first training {model.takes} can be read")
        self.model, self.recipe, self.groups = model, recipe, GROUPS[recipe.train]
        self.names = trained_names(model, pixels[:1], self.groups)
        if recipe.train != "none" and not self.names:
            raise CodebookError(
                f"train={recipe.train}: no gradient reaches the network's parameters through encode or decode"
            )
        by_gradient, by_average = (recipe.codebook_update == update for update in ("gradient", "ema"))
        self.parameters = set_trainable(model, self.names)
        self.objective = objective_of(model, train, recipe, pixels[:1], seed)
        # Two streams: the batches must not depend on how many codes a strategy leaves to be revived.
        self.batches = Batches(train, recipe.batch_size, seed, pixels[:1])
        reviving = torch.Generator().manual_seed(seed + 1)
        self.quantisers = [
            Quantiser(model, stage, hits, by_average and stage in model.chosen, reviving)
            for stage, hits in enumerate(counts)
        ]
        if by_gradient:
            for stage in model.chosen:
                self.parameters.append(nn.Parameter(model.books[stage].vectors))
                model.books[stage].vectors = self.parameters[-1]
        self.optimiser = torch.optim.Adam(self.parameters, lr=recipe.lr) if self.parameters else None
        self._run = run_together(model, self.parameters)
        self._coming = iter(self.batches)
        self._seen = list[Seen]()

    def gradients(self) -> dict[str, Tensor]:
        """Find the gradients of one step. Returns the terms of the loss, of this process' share of the batch."""
        media, share = next(self._coming)
        media = media.to(self.model.device, non_blocking=True)
        seen = list[Seen]()

        def through(stage: int, latents: Tensor) -> Tensor:
            codes, quantised = self.quantisers[stage](latents)
            seen.append((latents, codes, quantised))
            return latents + (quantised - latents).detach()

        terms = self.objective(self._run(media, through), media, seen)
        if self.optimiser is not None:
            self.optimiser.zero_grad(set_to_none=True)
            # Processes average their gradients: each weighs as much of the batch as it is.
            torch.autograd.backward(reduce(torch.add, terms.values()) * (share * processes.count()))
        own = len(media) if share else 0
        self._seen = [(latents.detach()[:own], codes[:own], quantised.detach()) for latents, codes, quantised in seen]
        return {name: term.detach() * share for name, term in terms.items()}

    def move(self, step: int) -> None:
        """Move weights and codes by what `gradients` found. step: which one this is, from 1."""
        steps = self.recipe.steps
        if self.optimiser is not None:
            for group in self.optimiser.param_groups:
                group["lr"] = self.recipe.lr * rate(step - 1, steps)
            self.optimiser.step()
        self.objective.step()
        revive = step % REVIVE_EVERY == 0 and step <= REVIVE_UNTIL * steps
        for quantiser, (latents, codes, _) in zip(self.quantisers, self._seen, strict=True):
            quantiser.update(latents, codes, revive)

    @property
    def trained(self) -> tuple[str, ...]:
        """File keys of all that a gradient step may change in the network."""
        return tuple(sorted({self.model.keys[name] for name in written_names(self.model.network, self.names)}))
