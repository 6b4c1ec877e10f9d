"""How a command ends: its one output, or one line of what went wrong, and the exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer


def show_result(found: Any, table: Callable[[Any], Any], as_json: bool) -> None:
    """The one output: JSON, or a table."""
    from .screen import print_json, print_table

    print_json(found.to_json()) if as_json else print_table(table(found))


@contextmanager
def reported() -> Iterator[None]:
    """What goes wrong becomes one line on stderr and an exit code."""
    try:
        yield
        sys.stdout.flush()
    except typer.Exit:
        raise
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except KeyboardInterrupt:
        _say("interrupted; what was written is whole, or not there")
        raise typer.Exit(130) from None
    except Exception as error:
        from codebook_tools.errors import CodebookError

        if isinstance(error, CodebookError):
            _say(str(error))
            raise typer.Exit(error.exit_code) from None
        import traceback

        traceback.print_exc()
        _say("this is our fault; please report it, with the lines above and the command that you gave")
        raise typer.Exit(70) from None


def _say(message: str) -> None:
    from .screen import print_error

    print_error(message)
