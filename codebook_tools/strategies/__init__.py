"""The strategies by name: one a file, and those that other distributions add.

A third party adds its own through the entry-point group `codebook_tools.strategies`: NAME = "package.module:Class",
where Class is a frozen dataclass that fits `codebook_tools.codebook.Strategy`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from codebook_tools.codebook import Strategy
from codebook_tools.errors import CodebookError
from codebook_tools.strategies.prune import Prune
from codebook_tools.strategies.refit import Refit

ENTRY_POINTS = "codebook_tools.strategies"

STRATEGIES: dict[str, Callable[..., Strategy]] = {"refit": Refit, "prune": Prune}


def find_strategy(name: str) -> Callable[..., Strategy]:
    """The class of a strategy: ours, or one that an installed distribution adds. Raises CodebookError for others."""
    added = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name in STRATEGIES:
        return STRATEGIES[name]
    if name in added:
        strategy: Callable[..., Strategy] = added[name].load()
        return strategy
    raise CodebookError(f"no strategy {name!r}; there are {', '.join(sorted({*STRATEGIES, *added}))}")
