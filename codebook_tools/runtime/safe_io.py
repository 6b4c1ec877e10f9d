"""Reads untrusted files: regular ones only, of limited length, parsed to data or a ValueError."""

from __future__ import annotations

import errno
import json
import stat
from pathlib import Path
from typing import Any

_LONGEST = 64 << 20  # bytes; configs, results and recipes have thousandths of that


def read_bytes(path: Path, longest: int = _LONGEST) -> bytes:
    """Read a file whole.

    Raises:
        ValueError: It has more than `longest` bytes.
        OSError: It is not regular, or cannot be read.
    """
    check_regular(path)
    if (nbytes := path.stat().st_size) > longest:
        raise ValueError(f"it has {nbytes:,} bytes, more than {longest:,}")
    return path.read_bytes()


def read_text(path: Path, longest: int = _LONGEST) -> str:
    """As `read_bytes`, decoded; a ValueError, too, where it is not UTF-8."""
    return read_bytes(path, longest).decode()


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: The text is no JSON, or is nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def check_regular(path: Path) -> None:
    """Refuse pipes, sockets and devices: opening one may wait forever, and what is read from one is gone.

    Folders pass, for their callers have better messages.

    Raises:
        OSError: The path is none of a file or a folder, or does not exist.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "it is no regular file (a pipe or a device); save it to a file first")
