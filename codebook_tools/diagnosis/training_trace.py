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
class Look:
    """One point of a trace: validation_mse and codes in use at a step."""

    step: int
    validation_mse: float
    used: int


@dataclass(frozen=True)
class Trace:
    """looks: by step, the first at 0. size: codes of all codebooks. latents: of the validation data, on which they were
    counted. operated: whether a surgery came before the training. lr: its learning rate. None: the file does not say.
    """

    looks: tuple[Look, ...]
    size: int | None
    latents: int | None
    operated: bool
    lr: float | None

    @property
    def start(self) -> int:
        """Codes in use before the first step."""
        return self.looks[0].used

    @property
    def first(self) -> Look | None:
        """After the first step."""
        return self.looks[1] if len(self.looks) > 1 and self.looks[1].step == 1 else None

    @property
    def lowest(self) -> Look:
        """Where the fewest codes are in use."""
        return min(self.looks, key=lambda look: look.used)

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
        """The step at which half of that was lost."""
        half = (self.start + self.lowest.used) / 2
        return next(look.step for look in self.looks if look.used <= half)

    @property
    def rise(self) -> float:
        """The highest validation error over the lowest before it."""
        best, most = self.looks[0].validation_mse, 1.0
        for look in self.looks:
            most = max(most, look.validation_mse / max(best, 1e-30))
            best = min(best, look.validation_mse)
        return most


def read_trace(path: Path) -> Trace:
    """Raises CodebookError where the file is no result, or one of no training."""
    try:
        content = parse_json(read_text(path))
    except OSError as error:
        raise CodebookError(f"--trace {path}: {error.strerror}") from error
    except ValueError as error:
        raise CodebookError(f"--trace {path} is no JSON: {error}") from error
    points: Any = content.get("trace") if isinstance(content, dict) else content
    try:
        looks = tuple(Look(_count(p["step"]), float(p["validation_mse"]), _count(p["used"])) for p in points)
        if not looks or looks[0].step != 0:
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
        return Trace(looks, size, latents, operated, None if lr is None else float(lr))
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError, ZeroDivisionError) as error:
        raise CodebookError(
            f"--trace {path} has no trace of a training ({error}); give what `codebook refit --json` wrote"
        ) from error


def _count(said: Any) -> int:
    count = int(said)
    if not 0 <= count < 2**53:  # so that shares of it are exact numbers
        raise ValueError(f"{str(count)[:20]} is no count")
    return count
