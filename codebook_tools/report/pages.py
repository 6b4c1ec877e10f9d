"""Which page shows what a command found, and where it goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from codebook_tools.codes import Codes
from codebook_tools.comparison import Comparison, write_text
from codebook_tools.diagnosis.diagnose import Diagnosis
from codebook_tools.errors import CodebookError
from codebook_tools.mapping import Map
from codebook_tools.outcome import Result
from codebook_tools.report.coded import codes_page
from codebook_tools.report.compared import compared_page
from codebook_tools.report.diagnosed import diagnosed_page
from codebook_tools.report.mapped import mapped_page, write_map
from codebook_tools.report.operated import operated_page
from codebook_tools.report.page import Page, html, require_plots
from codebook_tools.report.swept import swept_page
from codebook_tools.report.tables import Found
from codebook_tools.sweep import Sweep


def check_report(path: Path) -> None:
    """Raise CodebookError now, not after an hour, where a page cannot be drawn or written there."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise CodebookError(f"--report {path}: a page ends in .html; what is not one is never replaced")
    if path.is_dir() or not path.parent.is_dir():
        raise CodebookError(f"--report {path}: {'a folder' if path.is_dir() else f'no such folder: {path.parent}'}")
    require_plots()


def page_of(found: Found, command: str) -> Page:
    """The page of what a command found. command: what the user typed."""
    pages: dict[type, Callable[[Any, str], Page]] = {
        Result: operated_page,
        Comparison: compared_page,
        Sweep: swept_page,
        Codes: codes_page,
        Map: mapped_page,
        Diagnosis: diagnosed_page,
    }
    return pages[type(found)](found, command)


def write_report(found: Found, command: str, path: Path) -> dict[str, str]:
    """Write the page, whole or not at all, and what belongs beside it. Files that are there are replaced. Returns the
    paths."""
    write_text(path, html(page_of(found, command)))
    return {"report": str(path), **(write_map(found, path) if isinstance(found, Map) else {})}
