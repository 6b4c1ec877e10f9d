"""Fine-tuning with the original encoder and decoder, so that a repaired codebook stays repaired."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from codebook_tools.data.dataset import Media
from codebook_tools.errors import CodebookError, NotFiniteError
from codebook_tools.models.model import Model
from codebook_tools.runtime.progress import Watch
from codebook_tools.training.codebook_ema import ExtraCodes
from codebook_tools.training.history import History
from codebook_tools.training.learning_rate import evaluation_steps
from codebook_tools.training.loss_log import SUM, LossLog
from codebook_tools.training.recipe import FineTune
from codebook_tools.training.resume import SnapshotFile
from codebook_tools.training.state import Diverged, FineTuned, TracePoint
from codebook_tools.training.tracking import Scalars, Untracked, figures_of
from codebook_tools.training.trainer import Trainer

__all__ = ["FineTune", "FineTuned", "TracePoint", "finetune"]  # with the types of its argument and its result


def finetune(
    model: Model,
    train: Media,
    validation: Media,
    recipe: FineTune,
    counts: Sequence[Tensor],
    *,
    seed: int,
    watch: Watch,
    saving: SnapshotFile | None = None,
    log: Scalars | None = None,
    more: Mapping[int, ExtraCodes] | None = None,
    powers: Mapping[int, float] | None = None,
) -> FineTuned:
    """Train a model in place, and leave it in the state with the lowest validation error after at least one step.

    Only the chosen books move. Gradients pass the quantizers straight through (Bengio, Leonard and Courville 2013).
    A run that makes the model worse begins again once, at a lower rate.
    Several processes do together what one does alone: a batch is split among them.

    Args:
        model: The model.
        train: Items to train on.
        validation: Items that choose the best state.
        recipe: The settings; its losses are those of losses/.
        counts: (size,) of each book, assignments per code over the calibration data, where the codebook EMA starts.
        seed: Of the batches, revivals and the discriminator's weights.
        watch: Called with the progress.
        saving: Where a snapshot is written at each evaluation step, and an interrupted run resumed from.
        log: Gets the losses of each step, and the figures of each evaluation.
        more: Larger codebooks that some books start with, by index, and merge to their size on the way.
        powers: As Surgery's, of some books by index; 2 for the others.

    Returns:
        The start, the best state and the trace.

    Raises:
        CodebookError: The run diverged before there was a state to keep, or nothing can be trained.
    """
    trainer = Trainer(model, train, recipe, counts, seed, more or {}, powers or {})
    history = History(trainer, validation, saving)
    diverged = _train(trainer, history, watch, log or Untracked().log)
    model.network.eval().requires_grad_(False)
    best = history.best or (history.start if more else None)  # with more codes there is none to keep for a while
    (best or history.start).restore(model)
    if best is None:
        if saving:
            saving.remove()
        raise CodebookError(f"{diverged}; try a lower --lr")
    return FineTuned(
        start=history.start,
        best=best,
        trace=tuple(history.trace),
        trained=trainer.trained,
        groups=trainer.groups,
        lr=trainer.lr,
        optimizer="muon" if "muon" in trainer.optimizers else "adam",
        augment="mirror" if trainer.batches.mirror else "none",
        diverged=diverged,
        begun=trainer.begun,
        stopped=history.stopped,
        collapsed=history.collapsed,
        settled_from=recipe.settled_from,
        merged=trainer.merged,
    )


def _train(trainer: Trainer, history: History, watch: Watch, log: Scalars) -> Diverged | None:
    """Train to the last step or an early stop. Returns where the run diverged, if it did."""
    steps, loss_log = trainer.recipe.steps, LossLog(trainer.model.device)
    evaluated, step = evaluation_steps(steps), history.last.step
    if not step:
        log(step, figures_of(history.last, history.codes))
        trainer.widen()
    while step < steps and not history.stopped:
        if history.is_too_fast:
            trainer.begin_again(history.start, step)
        step += 1
        loss_log.add(trainer.gradients())
        loss = None
        if step % loss_log.every == 0 or step in evaluated:
            read, used = loss_log.read(trainer.in_use)
            for at, losses in enumerate(read, step + 1 - len(read)):
                if not math.isfinite(losses[SUM]):
                    terms = [name for name, loss in losses.items() if name != SUM and not math.isfinite(loss)]
                    return Diverged(at, f"{trainer.not_finite or ' and '.join(terms) or SUM} is not finite")
                log(at, {f"loss/{name}": value for name, value in losses.items()})
            loss = read[-1][SUM]
        trainer.move(step)
        if loss is not None:
            watch.progress("fine-tune", step, steps, loss=loss, used=used)
        if step in evaluated:
            try:
                history.evaluate(step, loss)
            except NotFiniteError as error:
                return Diverged(step, f"{trainer.not_finite} is not finite" if trainer.not_finite else str(error))
            log(step, figures_of(history.last, history.codes))
    return None
