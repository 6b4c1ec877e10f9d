"""When a run ends before its last step: nothing is gained any more, or codes are being lost."""

from __future__ import annotations

from collections.abc import Sequence

from codebook_tools.training.recipe import Recipe
from codebook_tools.training.states import TracePoint

_LEVERS = (
    ("a lower --lr", lambda recipe: True),
    ("--codebook-update ema", lambda recipe: recipe.codebook_update != "ema"),
    ("--train decoder", lambda recipe: recipe.train == "all"),
)
"""What keeps codes in use, and whether a recipe does without it."""


def has_fallen(recipe: Recipe, trace: Sequence[TracePoint], codes: int) -> bool:
    """Whether the last look finds fewer codes in use than `min_usage` of all, where an earlier one found as many."""
    enough = [point.used >= recipe.min_usage * codes for point in trace]
    return any(enough) and not enough[-1]


def reason_to_stop(recipe: Recipe, trace: Sequence[TracePoint], codes: int, merges_at: int) -> str | None:
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
