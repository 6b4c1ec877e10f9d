"""The history of a run: its evaluation steps, its best state, and whether it ends early."""

from __future__ import annotations

from collections.abc import Sequence

from codebook_tools.codebook import REMOVED
from codebook_tools.data.dataset import Media
from codebook_tools.errors import CodebookError, one_line
from codebook_tools.evaluation.measure import measure
from codebook_tools.runtime.progress import Watch
from codebook_tools.training.learning_rate import WARM_UP
from codebook_tools.training.losses.objective import validation_loss
from codebook_tools.training.recipe import FineTune
from codebook_tools.training.resume import SnapshotFile
from codebook_tools.training.state import State, TracePoint, is_better
from codebook_tools.training.trainer import Trainer


class History:
    """Evaluations of a run from step 0, or from the last one of an interrupted run, whose state the trainer then gets.

    Attributes:
        trainer: What is evaluated.
        validation: The items to evaluate on.
        saving: Where snapshots are written; None for none.
        codes: Sizes of all codebooks together.
        trace: One point for each evaluation step.
        start: The state at step 0.
        best: The state with the lowest validation error after at least one step and any merge; None before.

    Raises:
        CodebookError: The snapshot does not fit this run.
    """

    def __init__(self, trainer: Trainer, validation: Media, saving: SnapshotFile | None) -> None:
        self.trainer, self.validation, self.saving = trainer, validation, saving
        self.codes = sum(len(revived) for revived in trainer.revived)
        self.best: State | None = None
        snapshot = saving.read() if saving else None
        with trainer.evaluation_mode():
            self.trace = [*snapshot.trace] if snapshot else [self._measured(0, None)]
            self.start = State.of(trainer.model, self.trace[0], trainer.revived)
        if saving and snapshot:
            snapshot.check(self.start, saving.path)
            try:
                trainer.load(snapshot.training)
            except (KeyError, ValueError, TypeError, RuntimeError) as error:
                unfit = f"{saving.path} does not fit this run ({one_line(error)})"
                raise CodebookError(f"{unfit}; --force without --resume begins anew") from error
            self.best = snapshot.best

    def evaluate(self, step: int, loss: float | None) -> None:
        """Measure after a step, update the best state, and write a snapshot.

        Raises:
            NotFiniteError: The network's outputs are not finite.
        """
        with self.trainer.evaluation_mode():
            self.trace.append(self._measured(step, loss))
            recipe, best = self.trainer.recipe, self.best
            fallen = has_fallen(recipe, self.trace, self.codes)
            better = best is None or (is_better(self.last, best, recipe.settled_from) and not fallen)
            if better and step >= self.trainer.merges_at:
                self.best = State.of(self.trainer.model, self.last, self.trainer.revived)
        if self.saving:
            self.saving.write(self.trainer.state(), self.trace, self.start, self.best)

    @property
    def last(self) -> TracePoint:
        """The last evaluation."""
        return self.trace[-1]

    @property
    def stopped(self) -> str | None:
        """Why the run ends early here; None where it goes on."""
        return reason_to_stop(self.trainer.recipe, self.trace, self.codes, self.trainer.merges_at)

    @property
    def is_too_fast(self) -> bool:
        """Whether the run has made the model worse, at a rate that was not asked for, and has not begun again yet."""
        trainer, recipe = self.trainer, self.trainer.recipe
        fixed = recipe.lr is not None or recipe.adversarial or not trainer.names or trainer.merges_at
        return not fixed and not trainer.begun and has_risen(recipe.steps, self.trace)

    @property
    def collapsed(self) -> bool:
        """Whether even the best state is below `min_usage`: then the first evaluation after the start was."""
        until = [point for point in self.trace if self.best and point.step <= self.best.step]
        return has_fallen(self.trainer.recipe, until, self.codes)

    def _measured(self, step: int, loss: float | None) -> TracePoint:
        trainer = self.trainer
        measured = measure(trainer.model, self.validation, split="validation", structure=False, watch=Watch())
        before = sum(int((codes == REMOVED).sum()) for codes in trainer.merged.values())
        revived = before + sum(int(codes.sum()) for codes in trainer.revived)
        error = validation_loss(trainer.objective, trainer.model, self.validation)
        return TracePoint.of(step, loss, measured, revived, error)


_LEVERS = (
    ("a lower --lr", lambda recipe: True),
    ("--codebook-update ema", lambda recipe: recipe.codebook_update != "ema"),
    ("--train decoder", lambda recipe: recipe.train == "all"),
)
"""What keeps codes in use, and whether a recipe does not use it yet."""


JUDGED_AT = 0.3  # of the run
WORSE = 0.1  # of the error at the start: good models rose by 0.15 to 0.47, collapsed ones by 0.065 at most
LASTING = 0.5  # of the largest rise: good models kept 0.68 to 0.91 of it, a collapsed one 0.38 to 0.54


def has_risen(steps: int, trace: Sequence[TracePoint]) -> bool:
    """Whether the validation error has risen, and stays up: judged once, at the first evaluation after 30 % of the run.

    Around the end of warm-up, where rates are highest, collapsed models may be worse for a while, too: no run is judged
    before one and a half times the warm-up, nor where half of the largest rise is gone. In the last third too few steps
    are left. To begin again in vain cost 10 % of the error (benchmarks/examples/items.py), to go on in vain 2 %
    (CIFAR-10).

    Args:
        steps: Of the whole run.
        trace: All evaluations so far, from step 0.
    """
    since = max(JUDGED_AT * steps, 1.5 * WARM_UP)
    points = [point for point in trace if point.step >= since]
    start, now = trace[0].error, trace[-1].error
    rises = now - start > max(WORSE * start, LASTING * (max(point.error for point in trace) - start))
    return rises and len(points) == 1 and points[0].step <= 2 / 3 * steps


def has_fallen(recipe: FineTune, trace: Sequence[TracePoint], codes: int) -> bool:
    """Whether usage is below `min_usage` of all codes at the last evaluation, and was not at an earlier one."""
    enough = [point.used >= recipe.min_usage * codes for point in trace]
    return any(enough) and not enough[-1]


def reason_to_stop(recipe: FineTune, trace: Sequence[TracePoint], codes: int, merges_at: int) -> str | None:
    """Why a run ends early at its last evaluation.

    Args:
        recipe: With `min_usage` and `patience`.
        trace: All evaluations so far.
        codes: Sizes of all codebooks together.
        merges_at: The step at which extra codes are merged; earlier states cannot be kept.

    Returns:
        The message for the user; None where the run goes on.
    """
    last = trace[-1]
    if has_fallen(recipe, trace, codes):
        levers = " or ".join(lever for lever, is_left in _LEVERS if is_left(recipe))
        return (
            f"at step {last.step} only {last.used} of {codes} codes were in use, fewer than --min-usage "
            f"{recipe.min_usage:g} asks for: the fine-tuning was stopped; try {levers}"
        )
    errors = [point.error for point in trace if point.step >= max(1, recipe.settled_from, merges_at)]
    since = len(errors) - 1 - errors.index(min(errors)) if errors else 0
    if recipe.patience is not None and since >= recipe.patience and last.step < recipe.steps:
        patience = f"--patience {recipe.patience} evaluation steps without a gain"
        return f"the fine-tuning was stopped at step {last.step}: {patience}"
    return None
