"""What is known of a run, evaluation by evaluation: its trace, its best state, and whether it ends early."""

from __future__ import annotations

from collections.abc import Sequence

from codebook_tools.codebook import REMOVED
from codebook_tools.data.dataset import Media
from codebook_tools.errors import CodebookError, one_line
from codebook_tools.evaluation.measure import measure
from codebook_tools.runtime.progress import Watch
from codebook_tools.training.losses.objective import pictures_loss
from codebook_tools.training.recipe import FineTune
from codebook_tools.training.resume import Saving
from codebook_tools.training.state import State, TracePoint, is_better
from codebook_tools.training.trainer import Training


class Course:
    """Begins with a look at step 0, or where an interrupted run was looked at last, with `training` set to that.

    best: the state with the lowest validation error after at least one step, and with as many codes as there are to be;
    None before. codes: of all codebooks.
    """

    def __init__(self, training: Training, validation: Media, saving: Saving | None) -> None:
        self.training, self.validation, self.saving = training, validation, saving
        self.codes = sum(len(of_book) for of_book in training.revived)
        self.best: State | None = None
        left = saving.left() if saving else None
        with training.as_kept():
            self.trace = [*left.trace] if left else [self._measured(0, None)]
            self.start = State.of(training.model, self.trace[0], training.revived)
        if saving and left:
            left.check(self.start, saving.path)
            try:
                training.load(left.training)
            except (KeyError, ValueError, TypeError, RuntimeError) as error:
                unfit = f"{saving.path} does not fit this run ({one_line(error)})"
                raise CodebookError(f"{unfit}; --force without --resume begins anew") from error
            self.best = left.best

    def look(self, step: int, loss: float | None) -> None:
        """Measure, keep the best, and save all. Raises NotFiniteError where the network gives no numbers."""
        with self.training.as_kept():
            self.trace.append(self._measured(step, loss))
            recipe, best = self.training.recipe, self.best
            fallen = has_fallen(recipe, self.trace, self.codes)
            better = best is None or (is_better(self.last, best, recipe.settled_from) and not fallen)
            if better and step >= self.training.merges_at:
                self.best = State.of(self.training.model, self.last, self.training.revived)
        if self.saving:
            self.saving.write(self.training.state(), self.trace, self.start, self.best)

    @property
    def last(self) -> TracePoint:
        return self.trace[-1]

    @property
    def stopped(self) -> str | None:
        """Why the run is to end here, where it is."""
        return reason_to_stop(self.training.recipe, self.trace, self.codes, self.training.merges_at)

    @property
    def collapsed(self) -> bool:
        """Whether even the best has lost codes that the guard is there to keep: the first look after the start did."""
        until = [point for point in self.trace if self.best and point.step <= self.best.step]
        return has_fallen(self.training.recipe, until, self.codes)

    def _measured(self, step: int, loss: float | None) -> TracePoint:
        found = measure(self.training.model, self.validation, split="validation", structure=False, watch=Watch())
        before = sum(int((codes == REMOVED).sum()) for codes in self.training.merged.values())
        revived = before + sum(int(codes.sum()) for codes in self.training.revived)
        validation_loss = pictures_loss(self.training.objective, self.training.model, self.validation)
        return TracePoint.of(step, loss, found, revived, validation_loss)


_LEVERS = (
    ("a lower --lr", lambda recipe: True),
    ("--codebook-update ema", lambda recipe: recipe.codebook_update != "ema"),
    ("--train decoder", lambda recipe: recipe.train == "all"),
)
"""What keeps codes in use, and whether a recipe does without it."""


def has_fallen(recipe: FineTune, trace: Sequence[TracePoint], codes: int) -> bool:
    """Whether the last look finds fewer codes in use than `min_usage` of all, where an earlier one found as many."""
    enough = [point.used >= recipe.min_usage * codes for point in trace]
    return any(enough) and not enough[-1]


def reason_to_stop(recipe: FineTune, trace: Sequence[TracePoint], codes: int, merges_at: int) -> str | None:
    """Why the run is to end at its last look, or None. codes: of all codebooks together. merges_at: the step before
    which there are more of them, and nothing to stay with."""
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
        return f"the fine-tuning was stopped at step {last.step}: --patience {recipe.patience} looks without a gain"
    return None
