"""Figures of a run for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from codebook_tools.errors import CodebookError, one_line
from codebook_tools.runtime import distributed
from codebook_tools.runtime.optional import require_installed
from codebook_tools.training.state import TracePoint

Scalars = Callable[[int, Mapping[str, float]], None]
"""Called with a step and figures by name."""


def require_tensorboard(folder: Path | None) -> None:
    """Raise CodebookError where there is a folder, and TensorBoard is missing or the folder cannot be written."""
    if folder is None:
        return
    require_installed("--log-dir", "tensorboard", "tensorboard")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CodebookError(f"cannot write into --log-dir {folder}: {one_line(error)}") from error


@contextmanager
def scalars_into(folder: Path | None, after: int) -> Iterator[Scalars]:
    """Open a writer of scalars, which writes on rank 0 only.

    Args:
        folder: Where to; None to write nothing.
        after: The step that a resumed run goes on from: scalars of later steps are replaced.

    Raises:
        CodebookError: TensorBoard is missing, or the folder cannot be written.
    """
    if folder is None or distributed.rank():
        yield lambda step, figures: None
        return
    require_tensorboard(folder)
    from torch.utils.tensorboard import SummaryWriter

    try:
        writer = SummaryWriter(folder, purge_step=after + 1 if after else None)
    except OSError as error:
        raise CodebookError(f"cannot write into --log-dir {folder}: {one_line(error)}") from error

    def write(step: int, figures: Mapping[str, float]) -> None:
        for name, figure in figures.items():
            writer.add_scalar(name, figure, step)

    with writer:
        yield write


def figures_of(point: TracePoint, codes: int) -> dict[str, float]:
    """The figures of an evaluation by their names in TensorBoard. codes: sizes of all codebooks together."""
    return {
        "validation/mse": point.validation_mse,
        "validation/error": point.error,
        "codebook/usage": point.used / codes,
        "codebook/used": point.used,
        "codebook/perplexity": point.perplexity,
        "codebook/distortion": point.distortion,
        "codebook/revived": point.revived,
    }
