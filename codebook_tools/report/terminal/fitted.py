"""Tables and sentences that fit the width of the terminal without cutting a cell or a word."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

_GAP = 2  # characters between columns


@dataclass(frozen=True, eq=False)
class Prose:
    """A sentence, wrapped between words: a terminal would wrap it within a number."""

    text: str
    style: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The lines of the sentence."""
        if cell_len(self.text) <= options.max_width:
            yield Text(self.text, self.style)
            return
        lines = textwrap.wrap(self.text, options.max_width, break_long_words=False, break_on_hyphens=False)
        yield from (Text(line, self.style) for line in lines)


@dataclass(frozen=True, eq=False)
class FittedTable:
    """A table of which each cell stands whole on one line.

    Where it is too wide, headings take several lines. Where it is still too wide, the least important columns are left
    out and named; without an importance, columns that do not fit follow below, beside the first columns again.

    Attributes:
        lines: Rows of cells, headings first.
        numbers: Whether all columns but the first are aligned at the right.
        fixed: Columns that every part begins with.
        importance: Headings of the columns that may be left out, the most important first.
        elsewhere: Where left-out columns can be read.
    """

    lines: Sequence[Sequence[str]]
    numbers: bool = True
    fixed: int = 1
    importance: Sequence[str] = ()
    elsewhere: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Parts of the table, one below the other."""
        columns = range(len(self.lines[0]))
        width = options.max_width
        widths = [self._width(column, (self.lines[0][column],)) for column in columns]
        if _total(widths) > width:
            widths = [self._width(column, self.lines[0][column].split()) for column in columns]
        left_out = self._left_out(widths, width) if self.importance else []
        for part in self._parts([column for column in columns if column not in left_out], widths, width):
            whole = max(width, _total([widths[column] for column in part]))  # rather too long than cut
            yield from console.render(self._table(part, widths), options.update(width=whole))
        if left_out:
            names = ", ".join(self.lines[0][column] for column in left_out)
            yield Prose(f"too wide for this terminal: {names}; {self.elsewhere}", "dim")

    def _width(self, column: int, heading: Iterable[str]) -> int:
        cells = (row[column] for row in self.lines[1:])
        return max((cell_len(text) for text in (*heading, *cells)), default=0)

    def _left_out(self, widths: Sequence[int], width: int) -> list[int]:
        """Columns that do not fit beside more important ones; without a figure first of all."""
        heading = list(self.lines[0])
        order = [heading.index(name) for name in self.importance if name in heading]
        empty = {column for column in order if all(row[column] in ("", "–") for row in self.lines[1:])}
        fitting = [column for column in range(len(heading)) if column not in order]
        for column in sorted(order, key=lambda column: column in empty):
            if _total([widths[other] for other in (*fitting, column)]) <= width or len(fitting) <= self.fixed:
                fitting.append(column)
        return [column for column in range(len(heading)) if column not in fitting]

    def _parts(self, columns: Sequence[int], widths: Sequence[int], width: int) -> Iterator[list[int]]:
        """Columns of each part of the table."""
        part = first = list(columns[: self.fixed])
        for column in columns[self.fixed :]:
            if len(part) > self.fixed and _total([widths[other] for other in (*part, column)]) > width:
                yield part
                part = first
            part = [*part, column]
        yield part

    def _table(self, part: Collection[int], widths: Sequence[int]) -> Table:
        headings, *rows = self.lines
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in part:
            heading = textwrap.fill(
                headings[column], max(1, widths[column]), break_long_words=False, break_on_hyphens=False
            )
            table.add_column(
                heading,
                justify="right" if column and self.numbers else "left",
                vertical="bottom",
                width=widths[column],
                no_wrap=True,
            )
        for row in rows:
            table.add_row(*(Text(row[column]) for column in part))
        return table


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)
