"""Traces of fine-tunings as curves: usage, perplexity, distortion and validation error over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codebook_tools.report.html.axes import plain_counts
from codebook_tools.runtime.optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {
    "used": "codes in use",
    "perplexity": "perplexity",
    "distortion": "distortion",
    "validation_mse": "validation error",
}

Trace = Sequence[Mapping[str, Any]]
"""Points of a fine-tuning, as in the JSON of a result."""


def draw_traces(traces: Mapping[str, Trace], path: Path) -> None:
    """Draw traces into a file, in the format of its ending.

    Args:
        traces: By name, a line each.
        path: Of the file, which is replaced.

    Raises:
        CodebookError: matplotlib is missing.
    """
    figure = require("a plot", "report", "matplotlib.figure").Figure(figsize=(14, 3.2), layout="constrained")
    draw_panels(traces, figure)
    figure.savefig(path)


def draw_panels(traces: Mapping[str, Trace], figure: Figure) -> None:
    """Draw traces, by name, onto an empty figure, one panel for each of PANELS. Steps are on a symmetric log axis."""
    for axes, key in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        draw_panel(traces, key, axes)
    if len(traces) > 1:
        figure.axes[0].legend()


def draw_panel(traces: Mapping[str, Trace], key: str, axes: Axes) -> None:
    """Draw one of PANELS, traces by name."""
    for name, trace in traces.items():
        axes.plot([point["step"] for point in trace], [point[key] for point in trace], ".-", label=name)
    axes.set(title=PANELS[key], xlabel="step")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=0)
    plain_counts(axes.xaxis)
