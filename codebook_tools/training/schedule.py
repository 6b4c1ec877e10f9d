"""When the learning rate is how high, and at which steps a run is looked at."""

from __future__ import annotations

import math

WARM_UP, FLOOR = 100, 0.05  # steps of linear warm-up; share of the learning rate that cosine decay ends at


def rate(step: int, steps: int) -> float:
    """Share of the learning rate after so many steps: linear warm-up, then cosine decay to FLOOR."""
    warm_up = min(WARM_UP, max(1, steps // 2))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def looks_at(steps: int) -> set[int]:
    """Early steps tell a bad installation from a later collapse; then ten looks over the run."""
    return {step for step in (1, 10, 100) if step <= steps} | set(range(0, steps + 1, max(1, steps // 10))) | {steps}
