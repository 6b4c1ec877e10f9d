"""Times phases and reports progress: the library calls a Watch, and its caller decides what to show."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

Show = Callable[[str, int, int | None, Mapping[str, float]], None]
"""Called with what is being done, how many items are done, of how many (None: unknown), and figures by name."""

PHASES = ("load", "encode", "strategy", "finetune", "measure", "write")


class Watch:
    """Measures seconds by phase and passes progress on. An inner phase pauses the outer one, so that phases add up."""

    def __init__(self, show: Show | None = None) -> None:
        self._show = show
        self._running: list[str] = []
        self._since = self._start = time.perf_counter()
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block as that of a phase of PHASES."""
        self._account()
        self._running.append(name)
        try:
            yield
        finally:
            self._account()
            self._running.pop()

    def _account(self) -> None:
        now = time.perf_counter()
        if self._running:
            self._seconds[self._running[-1]] += now - self._since
        self._since = now

    def progress(self, what: str, done: int, total: int | None = None, **figures: float) -> None:
        """Report progress.

        Args:
            what: What is being done.
            done: Items done.
            total: Items in all; None where that is unknown.
            figures: Worth showing beside it.
        """
        if self._show is not None:
            self._show(what, done, total, figures)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase, and as `total` those since the watch was made."""
        self._account()
        return {**self._seconds, "total": self._since - self._start}

    def within(self, name: str) -> Watch:
        """A new watch for a part of the work, whose progress is shown under a name."""
        show = self._show
        return Watch(None if show is None else lambda what, *rest: show(f"{name}: {what}", *rest))
