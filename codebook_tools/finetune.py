"""Fine-tuning with the original encoder and decoder, so that a repaired codebook stays repaired."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Literal

import torch
from torch import Tensor, nn

from codebook_tools import processes
from codebook_tools.errors import CodebookError, NotFiniteError
from codebook_tools.losses import Loss, Seen, loss_of, scales_of
from codebook_tools.measure import Measurement, measure
from codebook_tools.media import Media
from codebook_tools.models.model import Model
from codebook_tools.networks.network import Quantise
from codebook_tools.quantiser import REVIVE_EVERY, Quantiser
from codebook_tools.trainable import set_trainable, trained_names, training_mode, written_names
from codebook_tools.watch import Watch

REVIVE_UNTIL = 0.9  # of the run: the last codes placed need time to settle
WARM_UP, FLOOR = 100, 0.05  # steps of linear warm-up; share of the learning rate that cosine decay ends at
READ_EVERY = {"cpu": 1}  # steps from one reading of the losses to the next: a GPU would stand still for each
READ_OTHERWISE = 10


@dataclass(frozen=True)
class Recipe:
    """steps: of the optimiser, 0 for none. train: which networks. codebook_update: how the codes move; `ema` also
    revives dead ones. batch_size: images. lr: Adam's, at the end of warm-up. loss: of the reconstruction."""

    steps: int = 1000
    train: Literal["all", "decoder", "none"] = "all"
    codebook_update: Literal["ema", "gradient", "frozen"] = "ema"
    batch_size: int = 64
    lr: float = 1e-3
    loss: Loss = "mse"

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise CodebookError(f"{name}={getattr(self, name)} is below {least}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise CodebookError(f"lr={self.lr} is no learning rate; try --lr 0.001")
        if self.steps and self.train == "none" and self.codebook_update == "frozen":
            raise CodebookError("train=none with codebook_update=frozen leaves nothing to train; use --steps 0")


@dataclass(frozen=True)
class TracePoint:
    """One look at a run, over all validation images. loss: of the batch, None at step 0. used: codes; revived: those
    so far; of all codebooks together. perplexity and distortion: the mean over codebooks."""

    step: int
    loss: float | None
    validation_mse: float
    used: int
    perplexity: float
    distortion: float
    revived: int


@dataclass(frozen=True, eq=False)
class State:
    """Weights of a network and codes of its books at a step. revived: (size,) bool of each book, the codes that were
    moved to a latent up to then."""

    step: int
    validation_mse: float
    weights: dict[str, Tensor] = field(repr=False)
    vectors: tuple[Tensor, ...] = field(repr=False)
    revived: tuple[Tensor, ...] = field(repr=False)

    def restore(self, model: Model) -> None:
        model.network.load_state_dict(self.weights)
        for book, vectors in zip(model.books, self.vectors, strict=True):
            book.vectors = vectors.to(model.device)


@dataclass(frozen=True, eq=False)
class FineTuned:
    """start: before the first step. best: the lowest validation error after it. trained: file keys of the parameters
    that took part, and groups: which networks they are. diverged: the step whose loss, or network, was not finite."""

    start: State
    best: State
    trace: tuple[TracePoint, ...]
    trained: tuple[str, ...]
    groups: tuple[str, ...]
    diverged: int | None


def finetune(
    model: Model,
    train: Media,
    validation: Media,
    recipe: Recipe,
    counts: Sequence[Tensor],
    *,
    seed: int,
    watch: Watch,
) -> FineTuned:
    """Train `model` in place, and leave it in the state with the lowest validation error after at least one step.

    counts: (size,) int64 or float of each book, assignments per code over the calibration data, where the EMA starts.
    Only the chosen books move. The loss is that of losses.py. Gradients pass the quantisers straight through (Bengio,
    Leonard and Courville 2013). Several processes do together what one does alone: a batch is split among them.
    """
    # Two streams: the batches must not depend on how many codes a strategy leaves to be revived.
    shuffling, reviving = (torch.Generator().manual_seed(seed + stream) for stream in (0, 1))
    first, pixels = train.load(train.items[: recipe.batch_size])
    if not first:
        raise CodebookError(f"none of the first training {model.takes} can be read")
    groups = {"all": ("encoder", "decoder"), "decoder": ("decoder",), "none": ()}[recipe.train]
    names = trained_names(model, pixels[:1], groups)
    if recipe.train != "none" and not names:
        raise CodebookError(
            f"train={recipe.train}: no gradient reaches the network's parameters through encode or decode"
        )
    by_gradient, by_average = (recipe.codebook_update == update for update in ("gradient", "ema"))
    parameters = set_trainable(model, names)
    scales = processes.of_first(scales_of(model, train))
    quantisers = [
        Quantiser(model, stage, hits, by_average and stage in model.chosen, reviving)
        for stage, hits in enumerate(counts)
    ]
    if by_gradient:
        for stage in model.chosen:
            parameters.append(nn.Parameter(model.books[stage].vectors))
            model.books[stage].vectors = parameters[-1]
    optimiser = torch.optim.Adam(parameters, lr=recipe.lr) if parameters else None
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: _rate(s, recipe.steps)) if optimiser else None
    run = _run_of(model, parameters)

    looks = _looks(recipe.steps)
    trace: list[TracePoint] = []

    def look(step: int, loss: float | None, best: State | None = None) -> State:
        """The state at a step, or the best up to then where that is better."""
        processes.follow_first([*model.network.buffers(), *(book.vectors for book in model.books)])
        found = measure(model, validation, split="validation", structure=False, watch=Watch())
        trace.append(_point(step, loss, found, sum(int(q.revived.sum()) for q in quantisers)))
        if best is not None and not found.error < best.validation_mse:
            return best
        weights = {name: tensor.detach().cpu().clone() for name, tensor in model.network.state_dict().items()}
        vectors = tuple(book.vectors.detach().cpu().clone() for book in model.books)
        return State(step, found.error, weights, vectors, tuple(q.revived.clone() for q in quantisers))

    start = look(0, None)
    best: State | None = None
    diverged = None
    unread = list[Tensor]()
    read_every = READ_EVERY.get(model.device.type, READ_OTHERWISE)
    batches = _batches(train, recipe.batch_size, shuffling, pixels[:1])
    training_mode(model.network)
    for step in range(1, recipe.steps + 1):
        media, share = next(batches)
        media = media.to(model.device, non_blocking=True)
        seen = list[Seen]()

        def through(stage: int, latents: Tensor, seen: list[Seen] = seen) -> Tensor:
            codes, quantised = quantisers[stage](latents)
            seen.append((latents, codes, quantised))
            return latents + (quantised - latents).detach()

        loss = loss_of(run(media, through), media, seen, scales, recipe.loss, by_gradient)
        unread.append(loss.detach() * share)
        value = None
        if step % read_every == 0 or step in looks:
            losses = processes.summed(torch.stack(unread)).tolist()
            value = losses[-1]
            bad = [i for i, of in enumerate(losses) if not math.isfinite(of)]
            if bad:
                diverged = step + 1 - len(losses) + bad[0]
                break
            unread.clear()
        if optimiser is not None and schedule is not None:
            optimiser.zero_grad(set_to_none=True)
            # Processes average their gradients: each weighs as much of the batch as it is.
            torch.autograd.backward(loss * (share * processes.count()))
            optimiser.step()
            schedule.step()
        revive = step % REVIVE_EVERY == 0 and step <= REVIVE_UNTIL * recipe.steps
        for quantiser, (latents, codes, _) in zip(quantisers, seen, strict=True):
            own = len(media) if share else 0
            quantiser.update(latents.detach()[:own], codes[:own], revive)
        if value is not None:
            watch.progress("fine-tune", step, recipe.steps, loss=value, used=sum(q.in_use for q in quantisers))
        if step in looks:
            model.network.eval()
            try:
                best = look(step, value, best)
            except NotFiniteError:
                diverged = step
                break
            training_mode(model.network)
    model.network.eval().requires_grad_(False)
    (best or start).restore(model)
    if best is None:
        raise CodebookError(f"fine-tuning diverged at step {diverged}: its numbers are not finite; try a lower --lr")
    keys = sorted({model.keys[name] for name in written_names(model.network, names)})
    return FineTuned(start, best, tuple(trace), tuple(keys), groups, diverged)


class _Whole(nn.Module):
    """All that trains in one module, as DistributedDataParallel wants it."""

    def __init__(self, model: Model, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.network, self.trained, self.run = model.network, nn.ParameterList(parameters), model.run

    def forward(self, media: Tensor, quantise: Quantise) -> Tensor:
        return self.run(media, quantise)


def _run_of(model: Model, parameters: Sequence[nn.Parameter]) -> Callable[[Tensor, Quantise], Tensor]:
    """model.run, of several processes with gradients that are averaged over them."""
    if processes.count() == 1 or not parameters:
        return model.run
    return nn.parallel.DistributedDataParallel(_Whole(model, parameters), gradient_as_bucket_view=True)


def _looks(steps: int) -> set[int]:
    """Early steps tell a bad installation from a later collapse; then ten looks over the run."""
    return {step for step in (1, 10, 100) if step <= steps} | set(range(0, steps + 1, max(1, steps // 10))) | {steps}


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate at a step: linear warm-up, then cosine decay to FLOOR."""
    warm_up = min(WARM_UP, max(1, steps // 2))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def _batches(images: Media, size: int, random: torch.Generator, stand_in: Tensor) -> Iterator[tuple[Tensor, float]]:
    """Endless batches: every image once in a seeded order, then in another. The last, short batch is left out.

    Of several processes each has its own slice of every batch, and the share of the readable images that it is: 0 where
    there are none in it, and `stand_in`, one image, is there in their place.
    """
    size = min(size, len(images))
    own = processes.own_slice(size)

    def places() -> Iterator[list[int]]:
        while True:
            order = torch.randperm(len(images), generator=random).tolist()
            yield from (order[start : start + size][own] for start in range(0, len(order) - size + 1, size))

    for items, pixels in images.stream(places()):
        readable = int(processes.summed(torch.tensor(len(items)))) if images.skip_bad else size
        if readable:
            yield pixels if items else stand_in, len(items) / readable


def _point(step: int, loss: float | None, found: Measurement, revived: int) -> TracePoint:
    uses = found.codebooks
    perplexity, distortion = (mean(getattr(use, name) for use in uses) for name in ("perplexity", "distortion"))
    return TracePoint(step, loss, found.error, sum(use.used for use in uses), perplexity, distortion, revived)
