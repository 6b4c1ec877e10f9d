"""Fine-tuning with the original encoder and decoder, so that a repaired codebook stays repaired."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from codebook_tools import processes
from codebook_tools.errors import CodebookError, NotFiniteError
from codebook_tools.measure import measure
from codebook_tools.media import Media
from codebook_tools.models.model import Model
from codebook_tools.trainable import training_mode
from codebook_tools.training.recipe import Recipe
from codebook_tools.training.schedule import looks_at
from codebook_tools.training.states import FineTuned, State, TracePoint
from codebook_tools.training.step import Training
from codebook_tools.watch import Watch

__all__ = ["FineTuned", "Recipe", "TracePoint", "finetune"]  # with what it is given, and gives back

READ_EVERY = {"cpu": 1}  # steps from one reading of the losses to the next: a GPU would stand still for each
READ_OTHERWISE = 10


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
    training = Training(model, train, recipe, counts, seed)

    def look(step: int, loss: float | None) -> TracePoint:
        processes.follow_first([*model.network.buffers(), *(book.vectors for book in model.books)])
        found = measure(model, validation, split="validation", structure=False, watch=Watch())
        return TracePoint.of(step, loss, found, sum(int(quantiser.revived.sum()) for quantiser in training.quantisers))

    def state(point: TracePoint) -> State:
        return State.of(model, point, (quantiser.revived for quantiser in training.quantisers))

    trace = [look(0, None)]
    start = state(trace[0])
    best: State | None = None
    diverged = None
    looks = looks_at(recipe.steps)
    unread = list[Tensor]()
    read_every = READ_EVERY.get(model.device.type, READ_OTHERWISE)
    training_mode(model.network)
    for step in range(1, recipe.steps + 1):
        terms = training.gradients()
        unread.append(torch.stack([*terms.values()]))
        loss = None
        if step % read_every == 0 or step in looks:
            losses = processes.summed(torch.stack(unread)).sum(1).tolist()
            loss = losses[-1]
            bad = [i for i, of in enumerate(losses) if not math.isfinite(of)]
            if bad:
                diverged = step + 1 - len(losses) + bad[0]
                break
            unread.clear()
        training.move(step)
        if loss is not None:
            used = sum(quantiser.in_use for quantiser in training.quantisers)
            watch.progress("fine-tune", step, recipe.steps, loss=loss, used=used)
        if step in looks:
            model.network.eval()
            try:
                trace.append(look(step, loss))
            except NotFiniteError:
                diverged = step
                break
            if best is None or trace[-1].validation_mse < best.validation_mse:
                best = state(trace[-1])
            training_mode(model.network)
    model.network.eval().requires_grad_(False)
    (best or start).restore(model)
    if best is None:
        raise CodebookError(f"fine-tuning diverged at step {diverged}: its numbers are not finite; try a lower --lr")
    return FineTuned(start, best, tuple(trace), training.trained, training.groups, diverged)
