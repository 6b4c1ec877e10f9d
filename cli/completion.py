"""Shell completions: names that are known without torch, which takes seconds to import."""

from __future__ import annotations

from importlib.metadata import entry_points

ROWS = (
    *("untouched", "untouched+same-recipe", "untouched+textbook", "prune", "refit", "grow", "condense"),
    *("quantize", "quantize+pnn", "restart", "top-k", "random", "kmeans++-seeds", "refit+fresh-network"),
    *("restart+random", "restart+split", "restart+nearest", "refit+used", "refit+textbook", "refit+frozen-encoder"),
)
"""The library's rows of a comparison once more."""


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
    before, comma, last = incomplete.rpartition(",")
    named = {*before.split(",")}
    added = [point.name for point in entry_points(group="codebook_tools.strategies")]
    return [f"{before}{comma}{row}" for row in (*ROWS, *added) if row.startswith(last) and row not in named]
