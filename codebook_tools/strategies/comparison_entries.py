"""The rows that a comparison can have, by name. Imported by the shell completion: without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from codebook_tools.errors import CodebookError
from codebook_tools.strategies import STRATEGIES, find_strategy


@dataclass(frozen=True)
class Entry:
    """How a row is made.

    Attributes:
        strategy: Its name; None for the codebook as it is.
        settings: Of the strategy, beside k and seed.
        recipe: Fields of FineTune that differ from the other rows'.
        fresh: Whether encoder and decoder get new weights.
    """

    strategy: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    fresh: bool = False


# As van den Oord et al. 2017 have it in equation 3: codes move by gradient, and nothing revives the dead.
_TEXTBOOK = {"codebook_update": "gradient"}

ENTRIES = {
    "untouched": Entry(recipe={"steps": 0}),
    "untouched+same-recipe": Entry(),
    "untouched+textbook": Entry(recipe=_TEXTBOOK),
    **{name: Entry(name) for name in STRATEGIES},
    "quantize+pnn": Entry("quantize", {"method": "pnn"}),
    "refit+fresh-network": Entry("refit", fresh=True),
}
"""The rows that a comparison has by default."""

MORE_ENTRIES = {
    **{f"restart+{method}": Entry("restart", {"method": method}) for method in ("random", "split", "nearest")},
    "refit+used": Entry("refit", {"init": "used"}),
    "refit+textbook": Entry("refit", recipe=_TEXTBOOK),
    "refit+frozen-encoder": Entry("refit", recipe={"train": "decoder"}),
}
"""Further rows, by name. Any strategy that is installed is a row by its own name, too."""


def find_entry(name: str) -> Entry:
    """The row of a name.

    Raises:
        CodebookError: There is no such row; the message lists all.
    """
    known = {**ENTRIES, **MORE_ENTRIES}
    if name in known:
        return known[name]
    try:
        find_strategy(name)
    except CodebookError as error:
        rows = [row for row in known if known[row].strategy != row]
        raise CodebookError(f"{error}; and the rows {', '.join(rows)}") from error
    return Entry(name)
