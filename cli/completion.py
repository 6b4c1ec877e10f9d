"""Shell completions: names that are known without torch, which takes seconds to import."""

from __future__ import annotations

from importlib.metadata import entry_points

DEVICES = ("auto", "cpu", "cuda", "xpu", "mps")
"""What --device takes, without numbers, and what others add to torch."""


def devices(incomplete: str) -> list[str]:
    """Completions of --device."""
    return [name for name in DEVICES if name.startswith(incomplete)]


def families(incomplete: str) -> list[str]:
    """Completions of --family."""
    from codebook_tools.models.registry import FAMILIES

    return [name for name in FAMILIES if name.startswith(incomplete)]


def rows(incomplete: str) -> list[str]:
    """Completions of the last of several rows with commas between them."""
    from codebook_tools.strategies.comparison_entries import ENTRIES, MORE_ENTRIES

    before, comma, last = incomplete.rpartition(",")
    named = {*before.split(",")}
    added = [point.name for point in entry_points(group="codebook_tools.strategies")]
    names = (*ENTRIES, *MORE_ENTRIES, *added)
    return [f"{before}{comma}{row}" for row in names if row.startswith(last) and row not in named]
