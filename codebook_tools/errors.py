"""What the user can fix, with the exit code each failure ends in."""


def plain(text: str) -> str:
    """The text with what does not print, or would move a terminal's cursor, escaped: names come from strangers."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class CodebookError(Exception):
    """The user can fix this. The message is one line: what, the value, the limit, the way out."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(plain(" ".join(line.strip() for line in message.splitlines() if line.strip())))


class VerificationError(CodebookError):
    """What was written, or installed, is not what was meant."""

    exit_code = 3


class NotFiniteError(CodebookError):
    """What a network returns, or what is added up of it, holds a NaN or an infinity."""


def one_line(error: Exception) -> str:
    """What an error says, on one line and without a path: whoever passes it on names the item."""
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(told.split()) or type(error).__name__
