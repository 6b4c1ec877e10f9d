"""The page of each kind of result, and where it is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from codebook_tools.checkpoints.atomic import write_text
from codebook_tools.errors import CodebookError
from codebook_tools.report.html.chain import chained_page
from codebook_tools.report.html.codes import codes_page, codes_parts
from codebook_tools.report.html.compare import compared_page
from codebook_tools.report.html.diagnose import diagnosed_page
from codebook_tools.report.html.map import map_plot, mapped_page, write_map
from codebook_tools.report.html.operate import operated_page
from codebook_tools.report.html.page import Page, html, require_plots
from codebook_tools.report.html.sweep import swept_page
from codebook_tools.report.terminal.tables import Found
from codebook_tools.runtime.progress import Watch
from codebook_tools.workflows.chain import Chain
from codebook_tools.workflows.code_cards import Codes, look_at_codes
from codebook_tools.workflows.comparison_rows import Comparison
from codebook_tools.workflows.diagnose import Diagnosis
from codebook_tools.workflows.latent_map import Map, look_at_map
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.result import Result
from codebook_tools.workflows.sweep import Sweep

_PATCHES, _CODES = 6, 32  # patches of a code, and codes, on the page of a surgery


def check_report(path: Path) -> None:
    """Check before any work that a page can be drawn and written.

    Raises:
        CodebookError: The path is not that of a page in a folder that exists, or a library is missing.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise CodebookError(f"--report {path}: a page ends in .html; what is not one is never replaced")
    if path.is_dir() or not path.parent.is_dir():
        raise CodebookError(f"--report {path}: {'a folder' if path.is_dir() else f'no such folder: {path.parent}'}")
    require_plots()


def page_of(result: Found, command: str) -> Page:
    """Make the page of a result. command: what the user typed."""
    pages: dict[type, Callable[[Any, str], Page]] = {
        Result: operated_page,
        Chain: chained_page,
        Comparison: compared_page,
        Sweep: swept_page,
        Codes: codes_page,
        Map: mapped_page,
        Diagnosis: diagnosed_page,
    }
    return pages[type(result)](result, command)


def page_with_model(result: Result | Chain, command: str, request: Request, watch: Watch) -> Page:
    """Make the page of one or several surgeries, with map and codes of the model that was written.

    Args:
        result: Of the surgeries.
        command: What the user typed.
        request: Of the model that was written, on the same data.
        watch: For times and progress.
    """
    plane = look_at_map(request, None, "pca", watch)
    codes = look_at_codes(request, _PATCHES, _CODES, "share", watch)
    more = [map_plot(plane), *codes_parts(codes)]
    return operated_page(result, command, more) if isinstance(result, Result) else chained_page(result, command, more)


def write_report(result: Found, page: Page, path: Path) -> dict[str, str]:
    """Write the page atomically, and the files of a map beside it; files that exist are replaced.

    Returns:
        Paths by name.
    """
    write_text(path, html(page))
    return {"report": str(path), **(write_map(result, path) if isinstance(result, Map) else {})}
