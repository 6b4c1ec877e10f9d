"""What the pages of all results have in common: title, headline, warnings, and at the end how they were made."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping

import torch

from codebook_tools.report.html.page import Listing, Page, Part
from codebook_tools.workflows.chain import Chain
from codebook_tools.workflows.code_cards import Codes
from codebook_tools.workflows.comparison_rows import Comparison
from codebook_tools.workflows.latent_map import Map
from codebook_tools.workflows.result import Result
from codebook_tools.workflows.sweep import Sweep


def result_page(
    result: Result | Chain | Comparison | Sweep | Codes | Map,
    headline: str,
    parts: Iterable[Part],
    command: str,
    notes: Iterable[str] = (),
) -> Page:
    """Make the page of a result.

    Args:
        result: Of a command.
        headline: What came out, in a sentence.
        parts: Tables, plots and pictures of the result.
        command: What the user typed.
        notes: Shown after the warnings of the result.
    """
    return Page(
        title=f"codebook {result.command}: {result.model}",
        headline=headline,
        parts=[*parts, *provenance(result.settings, result.seconds, result.version, result.seed)],
        command=command,
        warnings=(*result.warnings, *notes),
    )


def provenance(
    settings: Mapping[str, object], seconds: Mapping[str, float], version: str, seed: int | None = None
) -> Iterator[Listing]:
    """Settings, seconds by phase, and versions, as listings."""
    values = {name: str(value) for name, value in settings.items()}
    yield Listing("Settings", values if seed is None else {**values, "seed": str(seed)})
    yield Listing("Seconds", {name: f"{value:.1f}" for name, value in seconds.items()})
    versions = {"codebook-tools": version, "torch": torch.__version__, "python": platform.python_version()}
    yield Listing("Versions", {**versions, "machine": f"{platform.system()} {platform.machine()}"})
