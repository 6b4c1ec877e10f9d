"""A diagnosis for the terminal: a line and its evidence for each check, within 80 columns or the terminal's fewer."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from codebook_tools.diagnosis.finding import Check
from codebook_tools.report.terminal.fitted import Prose
from codebook_tools.workflows.diagnose import Diagnosis

STYLES = {"found": "bold red", "suspicious": "yellow", "ok": "green", "not-checked": "dim"}

_WIDTH, _INDENT = 80, " " * 13


def diagnosis_table(diagnosis: Diagnosis) -> RenderableType:
    """A headline, then every check with its evidence, and the fix where one is needed."""
    return Group(Prose(diagnosis.headline, style="bold"), "", *map(_CheckLines, diagnosis.checks))


@dataclass(frozen=True, eq=False)
class _CheckLines:
    """The lines of a check."""

    check: Check

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lines with evidence that is wrapped between words."""
        yield from _lines(self.check, min(_WIDTH, options.max_width))


def _lines(check: Check, width: int) -> Iterator[Text]:
    figures = "" if check.value is None or check.limit is None else f"{check.value:.3g}, limit {check.limit:g}"
    yield Text.assemble((f"{check.verdict:<13}", STYLES[check.verdict]), f"{check.name:<22}{figures}".rstrip())
    room = max(1, width - len(_INDENT))
    lines = textwrap.wrap(check.evidence, room, break_long_words=False, break_on_hyphens=False)
    yield from (Text(_INDENT + line, style="dim") for line in lines)
    if check.verdict in ("found", "suspicious"):
        yield Text(f"{_INDENT}-> {check.fix}")  # not wrapped, so that it can be copied
