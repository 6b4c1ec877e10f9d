"""What the pages of all results have in common: title, headline, warnings, and at the end how they were made."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator

import torch

from codebook_tools.models.demo import DEMO
from codebook_tools.report.html.page import Listing, Page, Part
from codebook_tools.workflows.diagnose import Diagnosis
from codebook_tools.workflows.result import ResultHeader


def result_page(
    result: ResultHeader, headline: str, parts: Iterable[Part], command: str, notes: Iterable[str] = ()
) -> Page:
    """Make the page of a result.

    Args:
        result: Of a command.
        headline: What came out, in a sentence.
        parts: Tables, plots and pictures of the result.
        command: What the user typed.
        notes: Shown after the warnings of the result.
    """
    model = "the bundled demo" if result.model == str(DEMO) else result.model
    return Page(
        title=f"codebook {result.command}: {model}",
        headline=headline,
        parts=[*parts, *_provenance(result)],
        command=command,
        warnings=(*result.warnings, *notes),
    )


def _provenance(result: ResultHeader) -> Iterator[Listing]:
    """Settings, seconds by phase, and versions, as listings."""
    settings = {name: str(value) for name, value in result.settings.items()}
    if not isinstance(result, Diagnosis):
        settings["seed"] = str(result.seed)
    yield Listing("Settings", settings)
    yield Listing("Seconds", {name: f"{value:.1f}" for name, value in result.seconds.items()})
    versions = {"codebook-tools": result.version, "torch": torch.__version__, "python": platform.python_version()}
    yield Listing("Versions", {**versions, "machine": f"{platform.system()} {platform.machine()}"})
