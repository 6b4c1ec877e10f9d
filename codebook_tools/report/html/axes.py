"""Axes of plots: ticks with plain numbers where an axis is logarithmic."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axis import Axis


def plain_log_ticks(axis: Axis) -> None:
    """Set ticks on a log axis, also where it spans less than a decade, and label them 0.005, not 5e-3."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=15) if high > 5 * low else MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def plain_counts(axis: Axis) -> None:
    """Label the ticks of a symmetric log axis 0, 1, 10, 100, 1,000."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
