"""Whether what lies under a path can be opened at any time, and read more than once."""

from __future__ import annotations

import errno
import stat
from pathlib import Path


def check_regular(path: Path) -> None:
    """Raise OSError for a pipe, a socket or a device: opening one may wait for ever, and what was read of it is gone.

    Folders pass: whoever opens one has words of its own for it. Raises OSError, too, where there is nothing.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "it is no regular file (a pipe or a device); save it to a file first")
