"""All that moves in a fine-tuning, and one step of it."""

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
from codebook_tools.training.codebook_ema import REVIVE_EVERY, More, Quantiser
from codebook_tools.training.ddp import run_together
from codebook_tools.training.learning_rate import rate, shares, usual_rate
from codebook_tools.training.losses.objective import objective_of
from codebook_tools.training.losses.reconstruction import Seen
from codebook_tools.training.parameters import set_trainable, trained_names, training_mode, written_names
from codebook_tools.training.recipe import FineTune
from codebook_tools.training.state import Tensors, by_number, joined, numbered, part
from codebook_tools.training.weight_average import WeightAverage

REVIVE_UNTIL = 0.9  # of the run: the last codes placed need time to settle
MERGE_AT = 0.6  # of the run: networks have learnt most by then, and the learning rate is still high enough to adapt

BETAS = (0.9, 0.95)  # of Adam; with 0.999 the first, large gradients still count after 1,000 steps

GROUPS = {"all": ("encoder", "decoder"), "decoder": ("decoder",), "none": ()}


def straight_through(latents: Tensor, quantised: Tensor) -> Tensor:
    """quantised, with gradients that go to the latents unchanged (Bengio, Leonard and Courville 2013)."""
    return latents + (quantised - latents).detach()


def _groups(parameters: Sequence[nn.Parameter]) -> list[dict[str, object]]:
    """For an optimiser: those that share a learning rate."""
    by_share = dict[float, list[nn.Parameter]]()
    for parameter, share in zip(parameters, shares(parameters), strict=True):
        by_share.setdefault(share, []).append(parameter)
    return [{"params": its, "share": share} for share, its in by_share.items()]


class Training:
    """A model in training: its parameters and their optimiser, its codes, the batches that are to come.

    counts: (size,) of each book, where the moving average starts. more: of books that begin with more codes than they
    have, once `widen` is called. Raises CodebookError where nothing can be trained.
    """

    def __init__(
        self,
        model: Model,
        train: Media,
        recipe: FineTune,
        counts: Sequence[Tensor],
        seed: int,
        more: Mapping[int, More],
    ) -> None:
        first, pixels = train.load(train.items[: recipe.batch_size])
        if not first:
            raise CodebookError(f"none of the first training {model.modality.many} can be read")
        self.model, self.recipe, self.groups = model, recipe, GROUPS[recipe.train]
        self.names = trained_names(model, pixels[:1], self.groups)
        if recipe.train != "none" and not self.names:
            raise CodebookError(
                f"train={recipe.train}: no gradient reaches the network's parameters through encode or decode"
            )
        by_gradient, by_average = (recipe.codebook_update == update for update in ("gradient", "ema"))
        self.parameters = set_trainable(model, self.names)
        images = recipe.batch_size * recipe.accumulate
        self.lr = usual_rate(self.parameters, images) if recipe.lr is None else recipe.lr
        self.objective = objective_of(model, train, recipe, pixels[:1], seed)
        # Two streams: the batches must not depend on how many codes a strategy leaves to be revived.
        self.batches = Batches(train, recipe.batch_size, seed, pixels[:1])
        self._reviving = torch.Generator().manual_seed(seed + 1)
        self.quantisers = [
            Quantiser(model, stage, hits, by_average and stage in model.chosen, self._reviving)
            for stage, hits in enumerate(counts)
        ]
        for book in model.books:  # written into from here on, and others may hold them as they were
            book.vectors = book.vectors.clone()
        assert by_average or not more, "only an average that revives codes has a use for more of them"
        self._more, self._sizes = more, [len(book.vectors) for book in model.books]
        if by_gradient:
            for stage in model.chosen:
                self.parameters.append(nn.Parameter(model.books[stage].vectors))
                model.books[stage].vectors = self.parameters[-1]
        self.optimiser = torch.optim.Adam(_groups(self.parameters), betas=BETAS) if self.parameters else None
        self.average = None if recipe.weight_ema is None else WeightAverage(self.parameters, recipe.weight_ema)
        self._run = run_together(model, self.parameters)
        self._coming = iter(self.batches)
        self._seen: list[list[tuple[Tensor, Tensor]]] = []

    @property
    def not_finite(self) -> str | None:
        """The first parameter that is not finite, as the network calls it, or codebook, as the file does."""
        named = [*self.model.network.named_parameters(), *((book.key, book.vectors) for book in self.model.books)]
        return next((name for name, tensor in named if not bool(tensor.isfinite().all())), None)

    def gradients(self) -> dict[str, Tensor]:
        """Find the gradients of one step. Returns the terms of the loss, of this process' share of its batches."""
        if self.optimiser is not None:
            self.optimiser.zero_grad(set_to_none=True)
        self._seen = [[] for _ in self.quantisers]
        found = [self._gradients_of(*next(self._coming)) for _ in range(self.recipe.accumulate)]
        return {name: reduce(torch.add, (terms[name] for terms in found)) for name in found[0]}

    def _gradients_of(self, media: Tensor, share: float) -> dict[str, Tensor]:
        """Those of one batch, on top of what is there."""
        media = sent(media, self.model.device)
        met: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in self.quantisers]

        def through(stage: int, latents: Tensor) -> Tensor:
            codes, quantised = self.quantisers[stage](latents)
            met[stage].append((latents, codes, quantised))
            return straight_through(latents, quantised)

        shown = self._run(media, through)
        seen = [
            Seen(of_stages(latents), of_stages(codes), of_stages(quantized), book)
            for (latents, codes, quantized), book in zip(
                (zip(*stages, strict=True) for stages in met), self.model.books, strict=True
            )
        ]
        terms = self.objective(shown, media, seen)
        weight = share / self.recipe.accumulate
        if self.optimiser is not None:
            # Processes average their gradients: each weighs as much of the batch as it is.
            torch.autograd.backward(reduce(torch.add, terms.values()) * (weight * distributed.count()))
        own = len(media) if share else 0
        for of_book, its in zip(self._seen, seen, strict=True):
            of_book.append((its.latents.detach()[:own], its.codes[:own]))
        return {name: term.detach() * weight for name, term in terms.items()}

    def move(self, step: int) -> None:
        """Move weights and codes by what `gradients` found. step: which one this is, from 1."""
        steps = self.recipe.steps
        if self.optimiser is not None:
            if self.recipe.clip is not None:
                nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
            for group in self.optimiser.param_groups:
                group["lr"] = self.lr * group["share"] * rate(step - 1, steps)
            self.optimiser.step()
        if self.average is not None:
            self.average.update()
        self.objective.step()
        revive = step % REVIVE_EVERY == 0 and step <= REVIVE_UNTIL * steps
        for quantiser, of_book in zip(self.quantisers, self._seen, strict=True):
            latents, codes = (torch.cat(batches) for batches in zip(*of_book, strict=True))
            quantiser.update(latents, codes, revive)
        if step == self.merges_at:
            for quantiser, size in zip(self.quantisers, self._sizes, strict=True):
                if len(quantiser.shares) > size:
                    quantiser.merge(size)

    def widen(self) -> None:
        """Go on with the codes that are to be merged."""
        for stage, more in self._more.items():
            self.quantisers[stage].widen(more)

    @property
    def merges_at(self) -> int:
        """The step that ends with as many codes as were asked for, 0 where there are never more."""
        return max(1, round(MERGE_AT * self.recipe.steps)) if self._more else 0

    @contextmanager
    def as_kept(self) -> Iterator[None]:
        """Within, the model is what would be kept of this step: at rest, and averaged where that is asked for."""
        self.model.network.eval()
        distributed.follow_first([*self.model.network.buffers(), *(book.vectors for book in self.model.books)])
        with nullcontext() if self.average is None else self.average.in_place():
            yield
        training_mode(self.model.network)

    @property
    def revived(self) -> list[Tensor]:
        """(size,) bool of each book: the codes that were moved to a latent, since codes were merged where they were."""
        return [quantiser.revived for quantiser in self.quantisers]

    @property
    def merged(self) -> dict[int, Tensor]:
        """What became of the codes that a book began with, as Quantiser has it, by index of the book."""
        found = {stage: quantiser.merged for stage, quantiser in enumerate(self.quantisers)}
        return {stage: merged for stage, merged in found.items() if merged is not None}

    @property
    def in_use(self) -> Tensor:
        """Codes that are not dead, of all books: a scalar on the device."""
        return reduce(torch.add, (quantiser.in_use for quantiser in self.quantisers))

    @property
    def trained(self) -> tuple[str, ...]:
        """File keys of all that a gradient step may change in the network."""
        return tuple(sorted({self.model.keys[name] for name in written_names(self.model.network, self.names)}))

    def state(self) -> Tensors:
        """All that steps change, so that those that follow come out the same: tensors by name."""
        adam = self.optimiser.state_dict()["state"] if self.optimiser else {}
        return joined(
            {
                "network": self.model.network.state_dict(),
                "books": by_number(book.vectors for book in self.model.books),
                **{f"quantiser {stage}": quantiser.state() for stage, quantiser in enumerate(self.quantisers)},
                **{f"adam {i}": of_parameter for i, of_parameter in adam.items()},
                "average": self.average.state() if self.average else {},
                "objective": self.objective.state(),
                "random": {"reviving": self._reviving.get_state(), "torch": torch.get_rng_state()},
                "batches": {"drawn": torch.tensor(self.batches.drawn)},
            }
        )

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self.model.network.load_state_dict(part(state, "network"))
        for book, vectors in zip(self.model.books, numbered(part(state, "books")), strict=True):
            if isinstance(book.vectors, nn.Parameter):
                book.vectors.detach().copy_(vectors)
            else:
                book.vectors = vectors.to(self.model.device)
        for stage, quantiser in enumerate(self.quantisers):
            quantiser.load(part(state, f"quantiser {stage}"))
        if self.optimiser is not None:
            found = {i: part(state, f"adam {i}") for i in range(len(self.parameters))}
            adam = {i: of_parameter for i, of_parameter in found.items() if of_parameter}
            self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": adam})
        if self.average is not None:
            self.average.load(part(state, "average"))
        self.objective.load(part(state, "objective"))
        random = part(state, "random")
        self._reviving.set_state(random["reviving"])
        torch.set_rng_state(random["torch"])
        self.batches.drawn = int(state["batches/drawn"])
