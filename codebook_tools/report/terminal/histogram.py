"""How often codes are used, in a line of a terminal for each stage."""

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
    """Codes from left to right, the most used first, as many to a column as need be; heights are logarithms of their
    mean hits, and nothing stands where all of them are dead. counts: (size,) by the name of the line."""

    counts: Mapping[str, Tensor]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        marks = _PLAIN if options.ascii_only else _BLOCKS
        indent = max(map(len, self.counts)) + 2
        width = max(1, min(_WIDEST, options.max_width - indent))
        for name, counts in self.counts.items():
            yield Text(f"{name:<{indent}}{bars(counts, width, marks)}", style="dim")


def bars(counts: Tensor, width: int, marks: str) -> str:
    """counts (size,) as at most `width` marks."""
    falling = counts.sort(descending=True).values.double()
    means = [float(some.mean()) for some in falling.tensor_split(min(width, len(falling)))]
    top = math.log1p(max(means))
    return "".join(
        marks[min(len(marks) - 1, int(len(marks) * math.log1p(mean) / top))] if mean else " " for mean in means
    ).rstrip()
