"""Where the time goes and how far the work is: the library tells a Watch, and whoever runs it decides what to show."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

Show = Callable[[str, int, int | None, Mapping[str, float]], None]
"""Called with what is being done, how many are done, of how many (None: unknown), and figures worth showing."""

PHASES = ("load", "encode", "strategy", "finetune", "measure", "write")


class Watch:
    """Seconds by phase, and progress. A phase inside another pauses the outer one, so the phases add up."""

    def __init__(self, show: Show | None = None) -> None:
        self._show = show
        self._running: list[str] = []
        self._since = self._start = time.perf_counter()
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
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
        if self._show is not None:
            self._show(what, done, total, figures)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, and `total` since the watch was made."""
        self._account()
        return {**self._seconds, "total": self._since - self._start}

    def within(self, name: str) -> Watch:
        """A watch of its own for a part of the work, whose progress is shown under a name."""
        show = self._show
        return Watch(None if show is None else lambda what, *rest: show(f"{name}: {what}", *rest))
