"""All that trains in a fine-tuning, and one step of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import reduce

import torch
from torch import Tensor, nn

from codebook_tools.data.dataset import Media
from codebook_tools.errors import CodebookError
from codebook_tools.models.model import Model, of_stages
from codebook_tools.runtime import distributed
from codebook_tools.runtime.devices import sent
from codebook_tools.training.batches import Batches
from codebook_tools.training.codebook_ema import REVIVE_EVERY, CodebookEMA, ExtraCodes
from codebook_tools.training.ddp import run_together
from codebook_tools.training.learning_rate import rate_of_codes, schedule, usual_rate
from codebook_tools.training.losses.objective import objective_of
from codebook_tools.training.losses.reconstruction import Quantized
from codebook_tools.training.optimizers import kernels_of, optimizers_of
from codebook_tools.training.parameters import set_trainable, trained_names, training_mode, written_names
from codebook_tools.training.recipe import FineTune
from codebook_tools.training.state import State, Tensors, by_number, joined, numbered, part
from codebook_tools.training.weight_average import WeightAverage

REVIVE_UNTIL = 0.9  # of the run: the last codes placed need time to settle
SLOWER = 0.25  # of the learning rate, for a model that the whole rate only makes worse
MERGE_AT = 0.6  # of the run: networks have learnt most by then, and the learning rate is still high enough to adapt

GROUPS = {"all": ("encoder", "decoder"), "decoder": ("decoder",), "none": ()}


def straight_through(latents: Tensor, quantized: Tensor) -> Tensor:
    """The quantized latents, with gradients that go to the latents unchanged (Bengio, Leonard and Courville 2013)."""
    return latents + (quantized - latents).detach()


class Trainer:
    """A model in training: its parameters and their optimizer, its codebooks, and the stream of batches.

    Attributes:
        model: The model.
        recipe: The settings.
        groups: The halves of the network that train.
        names: The parameters of the network that train.
        parameters: These, and the codes where gradients move them.
        lr: Adam's learning rate after warm-up.
        begun: The step after which training began, or began again from the weights and codes of the start.
        objective: The loss.
        batches: The training batches.
        codebooks: One codebook EMA a book.
        optimizers: By name; none where gradients move nothing.
        average: The moving average of the parameters; None without.
    """

    def __init__(
        self,
        model: Model,
        train: Media,
        recipe: FineTune,
        counts: Sequence[Tensor],
        seed: int,
        more: Mapping[int, ExtraCodes],
        powers: Mapping[int, float],
    ) -> None:
        """Prepare a model for training.

        Args:
            model: The model, trained in place.
            train: Items to train on.
            recipe: The settings.
            counts: (size,) of each book, where the codebook EMA starts.
            seed: Of batches, revivals and the discriminator's weights.
            more: Larger codebooks of some books, which `widen` puts in place.
            powers: Of the distance whose mean the codes of some books minimize; others minimize the mean square.

        Raises:
            CodebookError: Nothing can be trained.
        """
        self._counts, self.begun = counts, 0
        first = next(train.whole().batches(recipe.batch_size), None)
        if first is None:
            raise CodebookError(f"none of the first training {model.modality.many} can be read")
        pixels = first[1]
        self.model, self.recipe, self.groups = model, recipe, GROUPS[recipe.train]
        self.names = trained_names(model, pixels[:1], self.groups)
        if recipe.train != "none" and not self.names:
            raise CodebookError(
                f"train={recipe.train}: no gradient reaches the network's parameters through encode or decode"
            )
        by_gradient, by_average = (recipe.codebook_update == update for update in ("gradient", "ema"))
        self.parameters = set_trainable(model, self.names)
        self.objective = objective_of(model, train, recipe, pixels[:1], seed)
        self.lr = self._usual_rate() if recipe.lr is None else recipe.lr
        # Two streams: the batches must not depend on how many codes a strategy leaves to be revived.
        mirror = recipe.augment == "mirror" and model.modality.pictures
        self.batches = Batches(train, recipe.batch_size, seed, pixels[:1], mirror)
        self._reviving = torch.Generator().manual_seed(seed + 1)
        self.codebooks = [
            CodebookEMA(model, i, hits, by_average and i in model.chosen, self._reviving, powers.get(i, 2.0))
            for i, hits in enumerate(counts)
        ]
        for book in model.books:  # changed in place from here on, and others may refer to the tensors
            book.vectors = book.vectors.clone()
        assert by_average or not more, "only a codebook EMA, which revives codes, has a use for extra codes"
        self._more, self._sizes = more, [len(book.vectors) for book in model.books]
        if by_gradient:
            for stage in model.chosen:
                self.parameters.append(nn.Parameter(model.books[stage].vectors))
                model.books[stage].vectors = self.parameters[-1]
        self._prepare()
        self._run = run_together(model, self.parameters)
        self._coming = iter(self.batches)
        self._assigned: list[list[tuple[Tensor, Tensor]]] = []

    def _usual_rate(self) -> float:
        images = self.recipe.batch_size * self.recipe.accumulate
        if not self.recipe.decoder_moves_codes:
            return usual_rate(self.parameters, images)
        return rate_of_codes([self.objective.plain.scales.latents[stage] for stage in self.model.chosen], images)

    def _prepare(self) -> None:
        """Make optimizers and average anew, for the weights as they are and the steps that are left."""
        kernels = kernels_of(self.model.network) if self.recipe.by_muon else []
        self.optimizers = optimizers_of(self.parameters, kernels, self.recipe.steps - self.begun)
        decay = self.recipe.weight_ema
        self.average = None if decay is None else WeightAverage(self.parameters, decay)

    def begin_again(self, start: State, step: int) -> None:
        """Go back to the state at the start, for the rest of the run at a lower learning rate. step: the last one."""
        self.begun, self.lr = step, self.lr * SLOWER
        self._restore(start.weights, start.vectors)
        for codebook, counts in zip(self.codebooks, self._counts, strict=True):
            codebook.begin(counts)
        self._prepare()

    def _restore(self, weights: Mapping[str, Tensor], vectors: Sequence[Tensor]) -> None:
        """Copy in the network's state dict, and (size, dim) of each book: a parameter stays one."""
        self.model.network.load_state_dict(weights)
        for book, own in zip(self.model.books, vectors, strict=True):
            if isinstance(book.vectors, nn.Parameter):
                book.vectors.detach().copy_(own)
            else:
                book.vectors = own.to(self.model.device, copy=True)

    @property
    def not_finite(self) -> str | None:
        """Name of the first parameter, or file key of the first codebook, that is not finite; None where all are."""
        named = [*self.model.network.named_parameters(), *((book.key, book.vectors) for book in self.model.books)]
        return next((name for name, tensor in named if not bool(tensor.isfinite().all())), None)

    def gradients(self) -> dict[str, Tensor]:
        """Compute the gradients of one step.

        Returns:
            The terms of the loss by name, scalars: this process's part of them.
        """
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        self._assigned = [[] for _ in self.codebooks]
        batches = [self._gradients_of(*next(self._coming)) for _ in range(self.recipe.accumulate)]
        return {name: reduce(torch.add, (terms[name] for terms in batches)) for name in batches[0]}

    def _gradients_of(self, media: Tensor, fraction: float) -> dict[str, Tensor]:
        """Add those of one batch, of which this process has a fraction."""
        media = sent(media, self.model.device)
        parts: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in self.codebooks]

        def through(stage: int, latents: Tensor) -> Tensor:
            codes, quantized = self.codebooks[stage](latents)
            parts[stage].append((latents, codes, quantized))
            return quantized if self.recipe.decoder_moves_codes else straight_through(latents, quantized)

        reconstruction = self._run(media, through)
        if self.recipe.decoder_moves_codes and not reconstruction.requires_grad:
            raise CodebookError("train=none: no gradient reaches the codes through decode; use codebook_update=ema")
        outputs = []
        for stages, book in zip(parts, self.model.books, strict=True):
            latents, codes, quantized = (of_stages(tensors) for tensors in zip(*stages, strict=True))
            outputs.append(Quantized(latents, codes, quantized, book))
        terms = self.objective(reconstruction, media.to(reconstruction.dtype), outputs)
        weight = fraction / self.recipe.accumulate
        if self.optimizers:
            # Processes average their gradients: each weighs as much of the batch as it has.
            torch.autograd.backward(reduce(torch.add, terms.values()) * (weight * distributed.count()))
        own = len(media) if fraction else 0
        for assigned, output in zip(self._assigned, outputs, strict=True):
            assigned.append((output.latents.detach()[:own], output.codes[:own]))
        return {name: term.detach() * weight for name, term in terms.items()}

    def move(self, step: int) -> None:
        """Update weights and codes by the result of `gradients`. step: from 1."""
        steps, since = self.recipe.steps, self.begun
        if self.recipe.clip is not None and self.parameters:
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.lr * group["share"] * schedule(step - 1 - since, steps - since)
            optimizer.step()
        if self.average is not None:
            self.average.update()
        self.objective.step()
        revive = step % REVIVE_EVERY == 0 and step <= REVIVE_UNTIL * steps
        for codebook, assigned in zip(self.codebooks, self._assigned, strict=True):
            latents, codes = (torch.cat(batches) for batches in zip(*assigned, strict=True))
            codebook.update(latents, codes, revive)
        if step == self.merges_at:
            for codebook, size in zip(self.codebooks, self._sizes, strict=True):
                if len(codebook.usage) > size:
                    codebook.merge(size)

    def widen(self) -> None:
        """Put the extra codes in place."""
        for stage, extra in self._more.items():
            self.codebooks[stage].widen(extra)

    @property
    def merges_at(self) -> int:
        """The step at which extra codes are merged; 0 where there are none."""
        return max(1, round(MERGE_AT * self.recipe.steps)) if self._more else 0

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Within, the model is what would be kept of this step: in evaluation mode, with averaged weights if any."""
        self.model.network.eval()
        distributed.follow_first([*self.model.network.buffers(), *(book.vectors for book in self.model.books)])
        with nullcontext() if self.average is None else self.average.in_place():
            yield
        training_mode(self.model.network)

    @property
    def revived(self) -> list[Tensor]:
        """(size,) bool of each book: codes that were moved to a latent, since the merge where there was one."""
        return [codebook.revived for codebook in self.codebooks]

    @property
    def merged(self) -> dict[int, Tensor]:
        """By index of the book, what its extra codes were merged into, as in CodebookEMA."""
        return {stage: codebook.merged for stage, codebook in enumerate(self.codebooks) if codebook.merged is not None}

    @property
    def in_use(self) -> Tensor:
        """Scalar on the device: codes of all books that are not dead."""
        return reduce(torch.add, (codebook.in_use for codebook in self.codebooks))

    @property
    def trained(self) -> tuple[str, ...]:
        """File keys of all that a training step may change in the network."""
        return tuple(sorted({self.model.keys[name] for name in written_names(self.model.network, self.names)}))

    def state(self) -> Tensors:
        """All that steps change, by name, so that a resumed run ends in the same bytes."""
        moments = {name: optimizer.state_dict()["state"] for name, optimizer in self.optimizers.items()}
        return joined(
            {
                "network": self.model.network.state_dict(),
                "books": by_number(book.vectors for book in self.model.books),
                **{f"quantiser {stage}": codebook.state() for stage, codebook in enumerate(self.codebooks)},
                **{f"{name} {i}": of_one for name, of_all in moments.items() for i, of_one in of_all.items()},
                "average": self.average.state() if self.average else {},
                "objective": self.objective.state(),
                "random": {"reviving": self._reviving.get_state(), "torch": torch.get_rng_state()},
                "batches": {"drawn": torch.tensor(self.batches.drawn)},
                "rate": {"begun": torch.tensor(self.begun), "lr": torch.tensor(self.lr, dtype=torch.float64)},
            }
        )

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.begun, self.lr = int(state["rate/begun"]), float(state["rate/lr"])
        if self.begun:
            self._prepare()  # while the weights are as at the start, by which tensors learn
        self._restore(part(state, "network"), numbered(part(state, "books")))
        for stage, codebook in enumerate(self.codebooks):
            codebook.load(part(state, f"quantiser {stage}"))
        for name, optimizer in self.optimizers.items():
            moments = {i: part(state, f"{name} {i}") for i in range(len(self.parameters))}
            known = {i: of_parameter for i, of_parameter in moments.items() if of_parameter}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": known})
        if self.average is not None:
            self.average.load(part(state, "average"))
        self.objective.load(part(state, "objective"))
        random = part(state, "random")
        self._reviving.set_state(random["reviving"])
        torch.set_rng_state(random["torch"])
        self.batches.drawn = int(state["batches/drawn"])
