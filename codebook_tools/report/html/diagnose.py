"""The page of a diagnosis: every check, its measured value, and the command that fixes what it found."""

from __future__ import annotations

from codebook_tools.report.html.page import Listing, Page, Table
from codebook_tools.report.html.result_page import provenance
from codebook_tools.runtime.version import VERSION
from codebook_tools.workflows.diagnose import Diagnosis


def diagnosed_page(diagnosis: Diagnosis, command: str) -> Page:
    """The page of `codebook diagnose`."""
    names = ", ".join(check.name for check in diagnosis.found)
    rows = tuple(
        (check.name, check.verdict, _figure(check.value), _figure(check.limit), check.evidence)
        for check in diagnosis.checks
    )
    worse = frozenset(i for i, check in enumerate(diagnosis.checks) if check.verdict in ("found", "suspicious"))
    fixes = {check.name: check.fix for i, check in enumerate(diagnosis.checks) if i in worse}
    return Page(
        title=f"codebook diagnose: {diagnosis.model}",
        headline=f"Not healthy: {names}." if names else "Healthy: no check found anything.",
        parts=[
            Table(
                "Every check, causes before symptoms",
                ("check", "verdict", "measured", "limit", "evidence"),
                rows,
                marked=worse,
            ),
            *([Listing("What mends it", fixes, folded=False)] if fixes else []),
            *provenance(diagnosis.settings, diagnosis.seconds, VERSION),
        ],
        command=command,
        warnings=diagnosis.warnings,
    )


def _figure(number: float | None) -> str:
    return "–" if number is None else f"{number:.3g}"
