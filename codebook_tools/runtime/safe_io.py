"""Files from strangers: opened where they are regular, read whole where they are of a sane length, and parsed to data
or a ValueError."""

from __future__ import annotations

import errno
import json
import stat
from pathlib import Path
from typing import Any

LONGEST = 64 << 20
"""Bytes of a file that is read as text: configs, results and recipes have thousandths of that."""


def read_bytes(path: Path, longest: int = LONGEST) -> bytes:
    """Raises ValueError where it is longer, OSError as reading does."""
    check_regular(path)
    if (nbytes := path.stat().st_size) > longest:
        raise ValueError(f"it has {nbytes:,} bytes, more than {longest:,}")
    return path.read_bytes()


def read_text(path: Path, longest: int = LONGEST) -> str:
    """As `read_bytes`; ValueError, too, where it is no UTF-8."""
    return read_bytes(path, longest).decode()


def parse_json(text: str | bytes) -> Any:
    """Raises ValueError for all that is no JSON, and for what is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def check_regular(path: Path) -> None:
    """Raise OSError for a pipe, a socket or a device: opening one may wait for ever, and what was read of it is gone.

    Folders pass: whoever opens one has words of its own for it. Raises OSError, too, where there is nothing.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "it is no regular file (a pipe or a device); save it to a file first")
