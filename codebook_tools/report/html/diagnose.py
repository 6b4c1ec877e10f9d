"""The page of a diagnosis: every check, what it measured, and the command that mends it."""

from __future__ import annotations

from codebook_tools.report.html.operate import about
from codebook_tools.report.html.page import Listing, Page, Table
from codebook_tools.runtime.version import VERSION
from codebook_tools.workflows.diagnose import Diagnosis


def diagnosed_page(found: Diagnosis, command: str) -> Page:
    """command: what the user typed."""
    names = ", ".join(check.name for check in found.found)
    rows = tuple(
        (check.name, check.verdict, _figure(check.value), _figure(check.limit), check.evidence)
        for check in found.checks
    )
    worse = frozenset(i for i, check in enumerate(found.checks) if check.verdict in ("found", "suspicious"))
    fixes = {check.name: check.fix for i, check in enumerate(found.checks) if i in worse}
    return Page(
        title=f"codebook diagnose: {found.model}",
        headline=f"Not healthy: {names}." if names else "Healthy: no check found anything.",
        parts=[
            Table(
                "Every check, causes before symptoms",
                ("check", "verdict", "measured", "limit", "evidence"),
                rows,
                marked=worse,
            ),
            *([Listing("What mends it", fixes, folded=False)] if fixes else []),
            *about(found.settings, found.seconds, VERSION),
        ],
        command=command,
        warnings=found.warnings,
    )


def _figure(number: float | None) -> str:
    return "–" if number is None else f"{number:.3g}"
