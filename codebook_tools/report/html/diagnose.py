"""The page of a diagnosis: every check, its measured value, and the command that fixes what it found."""

from __future__ import annotations

from codebook_tools.report.html.page import Listing, Page, Part, Table
from codebook_tools.report.html.result_page import result_page
from codebook_tools.workflows.diagnose import Diagnosis


def diagnosed_page(diagnosis: Diagnosis, command: str) -> Page:
    """The page of `codebook diagnose`."""
    rows = tuple(
        (check.name, check.verdict, _figure(check.value), _figure(check.limit), check.evidence)
        for check in diagnosis.checks
    )
    worse = frozenset(i for i, check in enumerate(diagnosis.checks) if check.verdict in ("found", "suspicious"))
    fixes = {check.name: check.fix for i, check in enumerate(diagnosis.checks) if i in worse}
    head = ("check", "verdict", "measured", "limit", "evidence")
    parts: list[Part] = [Listing("What mends it", fixes, folded=False)] if fixes else []
    parts.append(Table("Every check, causes before symptoms", head, rows, marked=worse))
    headline = diagnosis.headline
    return result_page(diagnosis, f"{headline[0].upper()}{headline[1:]}.", parts, command)


def _figure(number: float | None) -> str:
    return "–" if number is None else f"{number:.3g}"
