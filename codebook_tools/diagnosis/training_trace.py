"""The trace of a training, as `refit --json` and `finetune --json` write it, and how its codes fell out of use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codebook_tools.errors import CodebookError
from codebook_tools.runtime.safe_io import parse_json, read_text

SOON = 100
"""Steps: what is half lost by then was not lost gradually."""

WORSENED = 1.5
"""Times the lowest error so far: long steps leave reconstructions worse, slow drift makes them better."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation step of a training.

    Attributes:
        step: Its number.
        validation_mse: Per value.
        used: Codes in use on the validation data.
    """

    step: int
    validation_mse: float
    used: int


@dataclass(frozen=True)
class Trace:
    """The history of a training.

    Attributes:
        history: Evaluation steps in order, the first at step 0.
        size: Codes of all codebooks; None where the file does not say.
        latents: Of the validation data, of all codebooks; None where the file does not say.
        operated: Whether a surgery came before the training.
        lr: Its learning rate; None where the file does not say.
    """

    history: tuple[Evaluation, ...]
    size: int | None
    latents: int | None
    operated: bool
    lr: float | None

    @property
    def start(self) -> int:
        """Codes in use before the first step."""
        return self.history[0].used

    @property
    def first(self) -> Evaluation | None:
        """The evaluation after the first step, if there was one."""
        return self.history[1] if len(self.history) > 1 and self.history[1].step == 1 else None

    @property
    def lowest(self) -> Evaluation:
        """The evaluation with the fewest codes in use."""
        return min(self.history, key=lambda each: each.used)

    @property
    def fall(self) -> float:
        """Share of the codes in use at the start that the training lost on its way."""
        return 1 - self.lowest.used / max(self.start, 1)

    @property
    def abrupt(self) -> bool:
        """Whether the codes were lost at once, or while the error rose: by steps that were too long."""
        return self.halfway <= SOON or self.rise > WORSENED

    @property
    def halfway(self) -> int:
        """The step at which half of the lost codes were lost."""
        half = (self.start + self.lowest.used) / 2
        return next(each.step for each in self.history if each.used <= half)

    @property
    def rise(self) -> float:
        """The highest validation error over the lowest before it."""
        best, most = self.history[0].validation_mse, 1.0
        for each in self.history:
            most = max(most, each.validation_mse / max(best, 1e-30))
            best = min(best, each.validation_mse)
        return most


def read_trace(path: Path) -> Trace:
    """Read the history of a training from a result in JSON.

    Raises:
        CodebookError: The file is no result, or one of no training.
    """
    try:
        content = parse_json(read_text(path))
    except OSError as error:
        raise CodebookError(f"--trace {path}: {error.strerror}") from error
    except ValueError as error:
        raise CodebookError(f"--trace {path} is no JSON: {error}") from error
    points: Any = content.get("trace") if isinstance(content, dict) else content
    try:
        history = tuple(Evaluation(_count(p["step"]), float(p["validation_mse"]), _count(p["used"])) for p in points)
        if not history or history[0].step != 0:
            raise ValueError("no step 0")
        result = content if isinstance(content, dict) else {}
        stages = [stage for stage in (result.get("stages") or {}).values() if stage]
        books, settings = (stages[-1]["codebooks"] if stages else []), result.get("settings") or {}
        images, lr = settings.get("images") or {}, settings.get("lr")
        size = sum(_count(book["size"]) for book in books) or None
        known = size and images.get("test")
        latents = (
            sum(_count(book["latents"]) for book in books) * _count(images["validation"]) // _count(images["test"])
            if known
            else None
        )
        operated = result.get("command") != "finetune"
        return Trace(history, size, latents, operated, None if lr is None else float(lr))
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError, ZeroDivisionError) as error:
        raise CodebookError(
            f"--trace {path} has no trace of a training ({error}); give what `codebook refit --json` wrote"
        ) from error


def _count(said: Any) -> int:
    count = int(said)
    if not 0 <= count < 2**53:  # so that shares of it are exact numbers
        raise ValueError(f"{str(count)[:20]} is no count")
    return count
