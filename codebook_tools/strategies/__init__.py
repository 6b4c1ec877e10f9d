"""The strategies by name: one a file, and those that other distributions add.

A third party adds its own through the entry-point group `codebook_tools.strategies`: NAME = "package.module:Class",
where Class is a frozen dataclass that fits `codebook_tools.codebook.Strategy`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, cast

from codebook_tools.codebook import Strategy
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.safe_io import parse_json
from codebook_tools.runtime.type_checks import check_kinds, fits, kinds_of
from codebook_tools.strategies.condense import Condense
from codebook_tools.strategies.controls import KmeansSeeds, RandomLatents, TopK
from codebook_tools.strategies.grow import Grow
from codebook_tools.strategies.prune import Prune
from codebook_tools.strategies.quantize import Quantize
from codebook_tools.strategies.refit import Refit
from codebook_tools.strategies.restart import Restart

if TYPE_CHECKING:
    import torch

ENTRY_POINTS = "codebook_tools.strategies"

__all__ = [
    "ENTRY_POINTS",
    "STRATEGIES",
    "Condense",
    "Grow",
    "KmeansSeeds",
    "Prune",
    "Quantize",
    "RandomLatents",
    "Refit",
    "Restart",
    "TopK",
    "declaration",
    "find_strategy",
    "make_strategy",
    "on_device",
]

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "refit": Refit,
    "prune": Prune,
    "quantize": Quantize,
    "restart": Restart,
    "grow": Grow,
    "condense": Condense,
    "top-k": TopK,
    "random": RandomLatents,
    "kmeans++-seeds": KmeansSeeds,
}
"""By name. A class with a `summary` is a command, too; the controls at the end are only rows of `compare`."""


def find_strategy(name: str) -> Callable[..., Strategy]:
    """The class of a strategy, ours or one that an installed distribution adds.

    Raises:
        CodebookError: There is none of that name, or its module does not load.
    """
    added = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name in STRATEGIES:
        return STRATEGIES[name]
    if name in added:
        try:
            strategy: Callable[..., Strategy] = added[name].load()
        except (ImportError, AttributeError) as error:
            raise CodebookError(f"strategy {name}, installed as {added[name].value}, does not load: {error}") from error
        return strategy
    raise CodebookError(f"no strategy {name!r}; there are {', '.join(sorted({*STRATEGIES, *added}))}")


def declaration(name: str | None, attribute: str) -> Any:
    """An attribute of a strategy's class, such as `keeps`; None where it has none, or no strategy has that name."""
    try:
        return getattr(find_strategy(name or ""), attribute, None)
    except CodebookError:
        return None


def on_device(strategy: Strategy, device: torch.device) -> Strategy:
    """The strategy on a device, if it has a field `device`; else as it is."""
    return cast(Strategy, replace(cast(Any, strategy), device=str(device))) if hasattr(strategy, "device") else strategy


def make_strategy(name: str, settings: Sequence[str]) -> Strategy:
    """Make a strategy from text.

    Args:
        name: Of a strategy.
        settings: Its fields as FIELD=VALUE; a value is JSON, or else text.

    Raises:
        CodebookError: There is no such strategy, or a field does not exist or does not take the value.
    """
    make = find_strategy(name)
    values, kinds = dict[str, object](), kinds_of(make)
    for setting in settings:
        field, equals, text = setting.partition("=")
        if not equals:
            raise CodebookError(f"--set {setting}: expected FIELD=VALUE")
        values[field] = _value(text, kinds.get(field, Any))
    check_kinds(f"strategy {name}", values, kinds)
    try:
        return make(**values)
    except TypeError as error:
        raise CodebookError(f"strategy {name} cannot be made from {values}: {error}") from error


def _value(text: str, kind: Any) -> object:
    try:
        value = parse_json(text)
    except ValueError:
        return text
    return text if fits(text, kind) and not fits(value, kind) else value
