"""A diagnosis for the terminal: a line and its evidence for each check, within 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from codebook_tools.diagnosis.finding import Check
from codebook_tools.workflows.diagnose import Diagnosis

STYLES = {"found": "bold red", "suspicious": "yellow", "ok": "green", "not-checked": "dim"}

_WIDTH, _INDENT = 80, " " * 13


def diagnosis_table(diagnosis: Diagnosis) -> RenderableType:
    """A headline, then every check with its evidence, and the fix where one is needed."""
    names = ", ".join(check.name for check in diagnosis.failed)
    headline = f"not healthy: {names}" if names else "healthy: nothing was found"
    return Group(Text(headline, style="bold"), "", *(line for check in diagnosis.checks for line in _lines(check)))


def _lines(check: Check) -> Iterator[Text]:
    figures = "" if check.value is None or check.limit is None else f"{check.value:.3g}, limit {check.limit:g}"
    yield Text.assemble((f"{check.verdict:<13}", STYLES[check.verdict]), f"{check.name:<22}{figures}".rstrip())
    lines = textwrap.wrap(check.evidence, _WIDTH - len(_INDENT), break_long_words=False, break_on_hyphens=False)
    yield from (Text(_INDENT + line, style="dim") for line in lines)
    if check.verdict in ("found", "suspicious"):
        yield Text(f"{_INDENT}-> {check.fix}")  # not wrapped, so that it can be copied
