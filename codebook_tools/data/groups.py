"""Groups of rows, one key a row: rows of one key stay in one split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from codebook_tools.data.array_files import stored_arrays
from codebook_tools.data.items import Item
from codebook_tools.data.rows import Groups, Rows
from codebook_tools.errors import CodebookError, one_line


def read_groups(path: Path) -> Groups:
    """Read one key a row: the values of a .npy file, (n,), or the lines of a text file.

    Raises:
        CodebookError: The file cannot be read, or holds something else.
    """
    if path.suffix.lower() == ".npy":
        (array,) = stored_arrays(path, "keys")
        if array.ndim != 1 or array.dtype.kind not in "iuUSb" or not len(array):
            raise CodebookError(f"{path} holds {array.dtype} {array.shape}; expected one integer or text a row, (n,)")
        values, of = np.unique(np.asarray(array), return_inverse=True)
        return Groups(of.astype(np.int64), tuple(map(_text, values.tolist())))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise CodebookError(f"no such file: {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CodebookError(f"cannot read groups from {path}: {one_line(error)}") from error
    keys = tuple(dict.fromkeys(lines))
    index = {key: i for i, key in enumerate(keys)}
    return Groups(np.array([index[line] for line in lines], dtype=np.int64), keys)


def _text(key: object) -> str:
    return key.decode(errors="surrogateescape") if isinstance(key, bytes) else str(key)


def grouped(items: Sequence[Item], groups: Groups) -> Sequence[Item]:
    """The items with their groups.

    Args:
        items: All items, in order of name.
        groups: One key an item, in that order.

    Raises:
        CodebookError: There are more or fewer keys than items.
    """
    if len(groups.of) != len(items):
        raise CodebookError(
            f"--group has {len(groups.of):,} keys for {len(items):,} rows of --data; expected one a row"
        )
    if not isinstance(items, Rows):
        keys = (groups.keys[of] for of in groups.of.tolist())
        return [replace(item, group=key) for item, key in zip(items, keys, strict=True)]
    ends = np.cumsum([file.length for file in items.files])
    parts = np.split(groups.of, ends[:-1])
    return Rows(
        tuple(replace(file, groups=Groups(of, groups.keys)) for file, of in zip(items.files, parts, strict=True))
    )
