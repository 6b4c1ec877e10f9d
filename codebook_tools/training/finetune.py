"""Fine-tuning with the original encoder and decoder, so that a repaired codebook stays repaired."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from codebook_tools.data.dataset import Media
from codebook_tools.errors import CodebookError, NotFiniteError
from codebook_tools.models.model import Model
from codebook_tools.runtime.progress import Watch
from codebook_tools.training.codebook_ema import More
from codebook_tools.training.history import Course
from codebook_tools.training.learning_rate import looks_at
from codebook_tools.training.loss_log import SUM, Readings
from codebook_tools.training.recipe import FineTune
from codebook_tools.training.resume import Saving
from codebook_tools.training.state import Diverged, FineTuned, TracePoint
from codebook_tools.training.tensorboard import Scalars, figures_of, scalars_into
from codebook_tools.training.trainer import Training

__all__ = ["FineTune", "FineTuned", "TracePoint", "finetune"]  # with what it is given, and gives back


def finetune(
    model: Model,
    train: Media,
    validation: Media,
    recipe: FineTune,
    counts: Sequence[Tensor],
    *,
    seed: int,
    watch: Watch,
    saving: Saving | None = None,
    log_dir: Path | None = None,
    more: Mapping[int, More] | None = None,
) -> FineTuned:
    """Train `model` in place, and leave it in the state with the lowest validation error after at least one step.

    counts: (size,) int64 or float of each book, assignments per code over the calibration data, where the EMA starts.
    saving: where the run is kept at each look, and goes on from if it was interrupted. log_dir: for TensorBoard. more:
    codes that some books begin with, by index, and merge into as many as they have on the way.
    Only the chosen books move. The loss is that of losses/. Gradients pass the quantisers straight through (Bengio,
    Leonard and Courville 2013). Several processes do together what one does alone: a batch is split among them.
    """
    training = Training(model, train, recipe, counts, seed, more or {})
    course = Course(training, validation, saving)
    with scalars_into(log_dir, after=course.last.step) as log:
        diverged = _train(training, course, watch, log)
    model.network.eval().requires_grad_(False)
    best = course.best or (course.start if more else None)  # with more codes there is none to keep for a while
    (best or course.start).restore(model)
    if best is None:
        if saving:
            saving.remove()
        raise CodebookError(f"{diverged}; try a lower --lr")
    return FineTuned(
        start=course.start,
        best=best,
        trace=tuple(course.trace),
        trained=training.trained,
        groups=training.groups,
        lr=training.lr,
        diverged=diverged,
        stopped=course.stopped,
        collapsed=course.collapsed,
        settled_from=recipe.settled_from,
        merged=training.merged,
    )


def _train(training: Training, course: Course, watch: Watch, log: Scalars) -> Diverged | None:
    """Train to the last step, or where there is a reason to stop. Returns where it was not finite, if it was not."""
    steps, readings = training.recipe.steps, Readings(training.model.device)
    looks, step = looks_at(steps), course.last.step
    if not step:
        log(step, figures_of(course.last, course.codes))
        training.widen()
    while step < steps and not course.stopped:
        step += 1
        readings.add(training.gradients())
        loss = None
        if step % readings.every == 0 or step in looks:
            read, used = readings.read(training.in_use)
            for its, losses in enumerate(read, step + 1 - len(read)):
                if not math.isfinite(losses[SUM]):
                    terms = [name for name, loss in losses.items() if name != SUM and not math.isfinite(loss)]
                    return Diverged(its, f"{training.not_finite or ' and '.join(terms) or SUM} is not finite")
                log(its, {f"loss/{name}": value for name, value in losses.items()})
            loss = read[-1][SUM]
        training.move(step)
        if loss is not None:
            watch.progress("fine-tune", step, steps, loss=loss, used=used)
        if step in looks:
            try:
                course.look(step, loss)
            except NotFiniteError as error:
                return Diverged(step, f"{training.not_finite} is not finite" if training.not_finite else str(error))
            log(step, figures_of(course.last, course.codes))
    return None
