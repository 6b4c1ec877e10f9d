"""The history of a run, and its final figures, for TensorBoard, trackio or Weights & Biases."""

from __future__ import annotations

import io
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codebook_tools.errors import CodebookError, one_line
from codebook_tools.evaluation.figures import CodebookUse, Measurement
from codebook_tools.evaluation.figures import figures_of as figures_named
from codebook_tools.runtime import distributed
from codebook_tools.runtime.optional import require, require_installed
from codebook_tools.training.state import TracePoint

PROJECT = "codebook-tools"
"""Under which trackio and Weights & Biases file a run."""

Scalars = Callable[[int, Mapping[str, float]], None]
"""Called with a step and figures by name."""


@dataclass(frozen=True)
class Tracking:
    """Where a run is written.

    Attributes:
        tracker: "tensorboard", "trackio" or "wandb".
        folder: For files of TensorBoard or Weights & Biases; None for the library's own place.
        name: Of the run.
        resumed: Whether it goes on with one that was broken off.
        settings: Of the run, where the library keeps them.
    """

    tracker: str
    folder: Path | None
    name: str
    resumed: bool = False
    settings: Mapping[str, object] = field(default_factory=dict)


class Tracker(ABC):
    """Writes one run. It is closed by `close`, also where the run failed."""

    @abstractmethod
    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Write figures of a step; steps never fall."""

    @abstractmethod
    def conclude(self, figures: Mapping[str, float]) -> None:
        """Write the figures of the whole run."""

    @abstractmethod
    def close(self, failed: bool) -> None:
        """End the run."""


class Untracked(Tracker):
    """Writes nothing."""

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...

    def conclude(self, figures: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class _TensorBoard(Tracker):
    def __init__(self, tracking: Tracking) -> None:
        self._folder, self._last = folder_of(tracking), 0
        self._writer: Any = None

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = self._open(step)
        self._last = step
        for name, figure in figures.items():
            self._writer.add_scalar(name, figure, step)

    def _open(self, step: int) -> Any:
        """A writer. A resumed run replaces what came after the step that it goes on from."""
        from torch.utils.tensorboard import SummaryWriter

        try:
            return SummaryWriter(self._folder, purge_step=step or None)
        except OSError as error:
            raise CodebookError(f"cannot write into --log-dir {self._folder}: {one_line(error)}") from error

    def conclude(self, figures: Mapping[str, float]) -> None:
        self.log(self._last, figures)

    def close(self, failed: bool) -> None:
        if self._writer is not None:
            self._writer.close()


class _Trackio(Tracker):
    def __init__(self, tracking: Tracking) -> None:
        self._library = require("--track trackio", "trackio", "trackio")
        self._last, resume = 0, "allow" if tracking.resumed else "never"
        try:
            with redirect_stdout(sys.stderr):  # stdout is the command's own
                self._run = self._library.init(
                    PROJECT, name=tracking.name, config=dict(tracking.settings), resume=resume
                )
        except (OSError, RuntimeError, ValueError) as error:
            raise CodebookError(f"--track trackio: {one_line(error)}") from error

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._last = step
        self._run.log(dict(figures), step=step)

    def conclude(self, figures: Mapping[str, float]) -> None:
        self.log(self._last, figures)

    def close(self, failed: bool) -> None:
        with redirect_stdout(sys.stderr):
            self._library.finish()  # it would finish a run that is left open when the process ends, on stdout


class _WandB(Tracker):
    def __init__(self, tracking: Tracking) -> None:
        wandb = require("--track wandb", "wandb", "wandb")
        typed, sys.stdin = sys.stdin, io.StringIO()  # it would ask for a key, below a bar of progress
        try:
            self._run = wandb.init(
                project=PROJECT,
                name=tracking.name,
                dir=tracking.folder,
                config=dict(tracking.settings),
                settings=wandb.Settings(init_timeout=_PATIENCE),
            )
        except wandb.errors.Error as error:
            raise CodebookError(f"--track wandb: {one_line(error)} WANDB_MODE=offline keeps the run here") from error
        finally:
            sys.stdin = typed

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def conclude(self, figures: Mapping[str, float]) -> None:
        self._run.summary.update(dict(figures))

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


_PATIENCE = 30  # seconds for the first answer of a server

_TRACKERS: Mapping[str, Callable[[Tracking], Tracker]] = {
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
    "wandb": _WandB,
}


def folder_of(tracking: Tracking) -> Path:
    """The folder of TensorBoard's files: the one that was named, or one of the run's name in ./runs."""
    return tracking.folder or Path("runs") / tracking.name


def require_tracker(tracking: Tracking | None) -> None:
    """Check that a run can be written, without the time to import what writes it.

    Raises:
        CodebookError: The library is missing, or the folder cannot be written or is none of its own.
    """
    if tracking is None:
        return
    asked = "--log-dir" if tracking.folder else f"--track {tracking.tracker}"
    require_installed(asked, tracking.tracker, tracking.tracker)
    if tracking.tracker == "trackio":
        if tracking.folder:
            raise CodebookError("--track trackio keeps runs in TRACKIO_DIR, or in its cache; leave out --log-dir")
        return
    folder = folder_of(tracking) if tracking.tracker == "tensorboard" else tracking.folder
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CodebookError(f"cannot write into --log-dir {folder}: {one_line(error)}") from error


@contextmanager
def tracked(tracking: Tracking | None) -> Iterator[Tracker]:
    """Open a tracker, which writes on rank 0 only.

    Args:
        tracking: Where to; None to write nothing.

    Raises:
        CodebookError: The library is missing, the folder cannot be written, or a server does not take the run.
    """
    if tracking is None or distributed.rank():
        yield Untracked()
        return
    require_tracker(tracking)
    tracker = _TRACKERS[tracking.tracker](tracking)
    try:
        yield tracker
    except BaseException:
        tracker.close(failed=True)
        raise
    tracker.close(failed=False)


def figures_by_phase(stages: Mapping[str, Measurement | None]) -> dict[str, float]:
    """The figures on test data by their names in a tracker, such as finetuned/mse; of several codebooks numbered."""
    figures = dict[str, float]()
    for phase, stage in stages.items():
        if stage is None:
            continue
        records = [(Measurement, stage, ""), *((CodebookUse, book, f"/{i}") for i, book in enumerate(stage.codebooks))]
        for kind, record, number in records:
            values = {name: getattr(record, name) for name in figures_named(kind)}
            ending = number if len(stage.codebooks) > 1 else ""
            figures |= {f"{phase}/{name}{ending}": of for name, of in values.items() if isinstance(of, int | float)}
    return figures


def figures_of(point: TracePoint, codes: int) -> dict[str, float]:
    """The figures of an evaluation by their names in a tracker. codes: sizes of all codebooks together."""
    return {
        "validation/mse": point.validation_mse,
        "validation/error": point.error,
        "codebook/usage": point.used / codes,
        "codebook/used": point.used,
        "codebook/perplexity": point.perplexity,
        "codebook/distortion": point.distortion,
        "codebook/revived": point.revived,
    }
