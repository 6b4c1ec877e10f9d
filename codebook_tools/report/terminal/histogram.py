"""Usage histograms in a terminal, a line for each phase."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from torch import Tensor

_BLOCKS, _PLAIN = "▁▂▃▄▅▆▇█", ".:-=+*#%"
_WIDEST = 64


@dataclass(frozen=True, eq=False)
class UsageLines:
    """A line of bars for each histogram: codes from left to right, the most used first, several to a bar if need be.

    The height of a bar is the logarithm of the mean count of its codes; where all of them are dead, there is a space.

    Attributes:
        counts: (size,) by name of the line.
    """

    counts: Mapping[str, Tensor]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        marks = _PLAIN if options.ascii_only else _BLOCKS
        indent = max(map(len, self.counts)) + 2
        width = max(1, min(_WIDEST, options.max_width - indent))
        for name, counts in self.counts.items():
            yield Text(f"{name:<{indent}}{bars(counts, width, marks)}", style="dim")


def bars(counts: Tensor, width: int, marks: str) -> str:
    """Draw a usage histogram.

    Args:
        counts: (size,) assignments of each code.
        width: Bars at most.
        marks: Bars of rising height.
    """
    falling = counts.sort(descending=True).values.double()
    means = [float(group.mean()) for group in falling.tensor_split(min(width, len(falling)))]
    top = math.log1p(max(means))
    heights = [int(len(marks) * math.log1p(mean) / top) if mean else None for mean in means]
    return "".join(" " if height is None else marks[min(len(marks) - 1, height)] for height in heights).rstrip()
