"""What the user can fix, with the exit code each failure ends in."""


class CodebookError(Exception):
    """The user can fix this. The message is one line: what, the value, the limit, the way out."""

    exit_code = 1


class VerificationError(CodebookError):
    """What was written, or installed, is not what was meant."""

    exit_code = 3
