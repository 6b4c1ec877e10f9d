"""What is known of a run, look by look: its trace, the state that it began in, and the best since."""

from __future__ import annotations

from codebook_tools.codebook import REMOVED
from codebook_tools.data.dataset import Media
from codebook_tools.errors import CodebookError, one_line
from codebook_tools.evaluation.measure import measure
from codebook_tools.runtime.progress import Watch
from codebook_tools.training.saving import Saving
from codebook_tools.training.several import pictures_loss
from codebook_tools.training.states import State, TracePoint, is_better
from codebook_tools.training.step import Training
from codebook_tools.training.stopping import has_fallen, reason_to_stop


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
