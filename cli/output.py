"""Output: progress and warnings on stderr, tables or one JSON object on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from codebook_tools.errors import plain

from .errors import on_stdout

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) != "\n"}


class Screen(Console):
    """A console that escapes control characters, which names from strangers may hold, and knows no markup."""

    def __init__(self, width: int | None = None, stderr: bool = False) -> None:
        """width: in characters; None for that of the terminal."""
        super().__init__(width=width, stderr=stderr, soft_wrap=True, highlight=False, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As the base class, with control characters escaped."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else text.translate(_CONTROLS), style, control)

    def on_broken_pipe(self) -> None:
        """Raise the error: the base class would end the process without a word, with exit code 1."""
        raise  # which the base class ends the process for, without a word and with exit code 1


ERRORS = Screen(stderr=True)


class ProgressShow(AbstractContextManager["ProgressShow"]):
    """Progress bars on a terminal; where stderr is piped a line now and then; nothing at all with quiet.

    Called as codebook_tools.runtime.progress.Show.

    Attributes:
        visible: Whether there are bars.
        quiet: Whether nothing is printed.
        said: Time of the last line.
        progress: The bars.
        tasks: By name, a bar with the time and count of its first report.
    """

    def __init__(self, quiet: bool) -> None:
        self.visible = ERRORS.is_terminal and not quiet
        self.quiet, self.said = quiet, time.perf_counter()
        self.progress = Progress(
            TextColumn("{task.description:<28}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=ERRORS,
            transient=True,
            expand=True,
        )
        self.tasks: dict[str, tuple[TaskID, float, int]] = {}  # with the time and count of the first report

    def __enter__(self) -> ProgressShow:
        if self.visible:
            self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.visible:
            self.progress.stop()

    def __call__(self, what: str, done: int, total: int | None, figures: Mapping[str, float]) -> None:
        if not self.visible:
            self._log(what, done, total, figures)
            return
        if what not in self.tasks or done < self.progress.tasks[self.tasks[what][0]].completed:
            for earlier, _, _ in self.tasks.values():
                self.progress.update(earlier, visible=False)
            task = self.progress.add_task(what, total=total, figures="")
            self.tasks[what] = task, time.perf_counter(), done
        task, since, first = self.tasks[what]
        texts = _shown(figures)
        if figures and total and done > first:
            texts.append(f"{(done - first) / (time.perf_counter() - since):.1f}/s")
        self.progress.update(task, completed=done, figures=" ".join(texts))

    def _log(self, what: str, done: int, total: int | None, figures: Mapping[str, float]) -> None:
        if not self.quiet and time.perf_counter() - self.said > SECONDS_A_LINE:
            self.said = time.perf_counter()
            of = f" of {total:,}" if total else ""
            ERRORS.print(" ".join([f"{what}: {done:,}{of}", *_shown(figures)]))


SECONDS_A_LINE = 20


def _shown(figures: Mapping[str, float]) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in figures.items()]


def print_json(value: Mapping[str, Any]) -> None:
    """One object on stdout."""
    with on_stdout():
        json.dump(value, sys.stdout, indent=2, allow_nan=False, default=str)
        sys.stdout.write("\n")


def print_table(table: RenderableType) -> None:
    """A table on stdout, as wide as the terminal; on a pipe as wide as it needs."""
    with on_stdout():
        # A pipe has no width: there, long paths stay in one piece.
        Screen(width=None if sys.stdout.isatty() else 10_000).print(table)


def print_warnings(warnings: list[str] | tuple[str, ...], quiet: bool) -> None:
    """A line each on stderr, unless quiet."""
    if not quiet:
        for warning in warnings:
            ERRORS.print(Text.assemble(("warning: ", "yellow"), plain(warning)))  # a line each


def print_note(text: str) -> None:
    """One line on stderr."""
    ERRORS.print(Text(plain(text)))


def print_error(message: str) -> None:
    """One line on stderr."""
    ERRORS.print(Text.assemble(("error: ", "bold red"), message))
