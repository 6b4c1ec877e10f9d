"""How a command ends: its one output or one line of error, and the exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from typing import Any, NoReturn

import typer

from codebook_tools.errors import CodebookError

_WRONG_USAGE = 2
LAST_WORDS = 10  # seconds that the first process needs at most
_LEFT_ALONE = (
    "another process ended before all was done: killed, or out of memory? "
    "--resume goes on from where a fine-tuning was kept last"
)


def show_result(result: Any, table: Callable[[Any], Any], as_json: bool) -> None:
    """Print the one output: JSON, or a table."""
    from .output import print_json, print_table

    print_json(result.to_json()) if as_json else print_table(table(result))


@contextmanager
def standard_streams() -> Iterator[None]:
    """Open closed streams to /dev/null, so that no file takes their place, and flush stdout at the end.

    Raises:
        SystemExit: stdout cannot be written; a line says why, unless its reader left.
    """
    for handle, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), handle)
            nowhere = os.fdopen(handle, mode, closefd=False)
            setattr(sys, name, nowhere)
            setattr(sys, f"__{name}__", nowhere)
    try:
        with on_stdout():
            yield
    except BrokenPipeError:
        raise SystemExit(0) from None
    except CodebookError as error:
        from .output import print_error

        print_error(str(error))
        raise SystemExit(error.exit_code) from None


@contextmanager
def on_stdout() -> Iterator[None]:
    """Flush stdout at the end.

    Raises:
        CodebookError: It cannot be written.
        BrokenPipeError: Its reader left, as `head` does.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or Python tries again, and complains, at its end
        if isinstance(error, BrokenPipeError):
            raise
        raise CodebookError(f"cannot write to standard output: {error.strerror or error}") from error


@contextmanager
def one_voice() -> Iterator[None]:
    """Silence all but the first of the processes that torchrun started; the others only say why they fail."""
    if _is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            yield
        except SystemExit as end:
            if end.code == _WRONG_USAGE:
                time.sleep(LAST_WORDS)  # the first says what is wrong; torchrun ends all as soon as one ends
            raise


def _is_first() -> bool:
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


class _TerminatedError(BaseException):
    """The end that a scheduler, a container or `timeout` asks for."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Repeat a Ctrl-C that comes while Python finalizes an object, where exceptions are ignored."""
    hook = sys.unraisablehook

    def ignored(what: sys.UnraisableHookArgs) -> None:
        _soon(signal.SIGINT) if what.exc_type is KeyboardInterrupt else hook(what)

    sys.unraisablehook = ignored
    try:
        yield
    finally:
        sys.unraisablehook = hook


def _soon(number: int) -> None:
    """Raise the signal again after the finalizer."""
    again = threading.Timer(_AGAIN, signal.raise_signal, [number])
    again.daemon = True  # where all is done by then, it is done
    again.start()


_AGAIN = 0.05  # seconds


@contextmanager
def _terminable() -> Iterator[list[int]]:
    """End on SIGTERM as on Ctrl-C, so that half-written files and workers are cleared away; a second SIGTERM kills.

    Yields the signals that arrived, for code in C may turn the exception into an error of its own.
    """
    came = list[int]()
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def end(number: int, frame: object) -> None:
        came.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _TerminatedError

    def interrupt(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    def ignored(what: sys.UnraisableHookArgs) -> None:
        if what.exc_type is not _TerminatedError:
            hook(what)
            return
        signal.signal(signal.SIGTERM, end)
        _soon(signal.SIGTERM)

    before, hook = signal.signal(signal.SIGTERM, end), sys.unraisablehook
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not so in the background
    if heeded:
        signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = ignored
    try:
        with interruptible():
            yield came
    finally:
        if heeded:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook = hook


_LEFT = "what was written is whole, or not there; with --resume, where a command has it, a fine-tuning goes on"


@contextmanager
def reported() -> Iterator[None]:
    """Turn an error into one line on stderr and an exit code."""
    came = list[int]()
    try:
        with _terminable() as came:
            _check_folder()
            yield
    except typer.Exit:
        raise
    except BrokenPipeError:  # the reader of our output left
        raise typer.Exit(0) from None
    except (KeyboardInterrupt, _TerminatedError) as end:
        _end_by(signal.SIGINT if isinstance(end, KeyboardInterrupt) else signal.SIGTERM)
    except Exception as error:
        if came:
            _end_by(came[-1])
        from codebook_tools.runtime import distributed

        if isinstance(error, CodebookError):
            _end(error.exit_code, str(error))
        if distributed.is_left_alone(error):
            _end(1, _LEFT_ALONE)
        if _is_out_of_memory(error):
            _end(1, f"out of memory ({' '.join(str(error).split())[:120]}); {_USE_LESS}")
        import traceback

        _end(
            70,
            "this is our fault; please report it, with the lines above and the command that you gave",
            before=traceback.format_exc(),
        )


_USE_LESS = "use a smaller --batch-size or --size, or fewer --workers; --limit where there is much data"


def _is_out_of_memory(error: Exception) -> bool:
    """Of the machine, or of an accelerator. torch has no type of its own for the former."""
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


def _check_folder() -> None:
    """Raise CodebookError where the current folder was deleted: torch's libraries would end the process for it."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise CodebookError("the current folder is no longer there; go to another with cd") from error


def _end_by(number: int) -> NoReturn:
    """Exit as after the signal `number`, SIGINT or SIGTERM."""
    from codebook_tools.runtime import distributed

    if number == signal.SIGINT:
        _end(130, f"interrupted; {_LEFT}")
    if distributed.count() > 1:  # torchrun ends all, and some wait for others that are gone
        raise typer.Exit(143) from None
    _end(143, f"terminated; {_LEFT}")


def _end(code: int, message: str, before: str = "") -> NoReturn:
    """Exit with a line that says why; of several processes one says it."""
    from codebook_tools.runtime import distributed

    def say() -> None:
        from .output import print_error

        with _aloud():
            sys.stderr.write(before)
            print_error(message)

    raise typer.Exit(distributed.fail(code, say)) from None


def _aloud() -> AbstractContextManager[object]:
    return nullcontext() if _is_first() else redirect_stderr(sys.__stderr__)
