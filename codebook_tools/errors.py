"""What the user can fix, with the exit code each failure ends in."""

from collections.abc import Sequence


def plain(text: str) -> str:
    """Escape characters that do not print or would move a terminal's cursor: names come from strangers."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class CodebookError(Exception):
    """An error that the user can fix, in one line: what failed, the value, the limit, the remedy.

    Attributes:
        exit_code: Of the command that the error ends.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(plain(" ".join(line.strip() for line in message.splitlines() if line.strip())))


class VerificationError(CodebookError):
    """What was written or installed differs from what was meant."""

    exit_code = 3


class NotFiniteError(CodebookError):
    """An output of a network, or a sum over outputs, holds a NaN or an infinity."""


def one_line(error: Exception) -> str:
    """The message of an error on one line and without a path: the caller names the item."""
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(message.split()) or type(error).__name__


def few_of(names: Sequence[str]) -> str:
    """The first three of some names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
