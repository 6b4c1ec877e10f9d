"""What a file tells of its codebooks by itself: flags that are not set, codes that nobody trained, and how many of them
live by the file's own running counts. No tensor of torch is made."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from codebook_tools.checkpoints.detect import COUNTS, FoundCodebook
from codebook_tools.checkpoints.effective import effective
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.models.initialization import as_initialised

FLAG = re.compile(r"(?:^|\.|_)(?:is_)?(?:init(?:t?ed|iali[sz]ed)?|data_initiali[sz]ed)$")

ALIVE = 1e-3
"""Of the mean running count: a code below it has long had no latents."""

_LEAST, _MOST = 16, 16_384  # codes: of fewer nobody can tell what drew them, and so many tell as much as more
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2"}
_NUMPY |= {"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "I8": "i1", "BOOL": "u1"}


def uninitialised(checkpoint: Checkpoint, books: Iterable[FoundCodebook]) -> Iterator[str]:
    """What every command says of codebooks that nobody initialized, a line each."""
    for book in books:
        flagged = [key for key in flags(book.key, checkpoint.entries) if _is_read(checkpoint, key)]
        unset = [key for key in flagged if not numbers(checkpoint, key).any()]
        if unset:
            yield f"{unset[0]} is 0: {book.key} is not initialized, and the model's own training starts it anew"
        if book.confidence != "high" or not _is_read(checkpoint, book.key):
            continue
        rows = _rows(checkpoint, book)
        if not rows.any():
            yield f"{book.key} is all zeros: no training has reached it"
        elif (rows == rows[0]).all() and book.size > 1:
            yield f"all {book.size:,} codes of {book.key} are the same"


def untrained(checkpoint: Checkpoint, books: Iterable[FoundCodebook]) -> Iterator[str]:
    """What commands that look say of codebooks that no training seems to have reached, a line each."""
    for book in books:
        sure = book.confidence == "high" and book.size >= _LEAST and _is_read(checkpoint, book.key)
        plain = effective(book, checkpoint.shapes).kind == "rows"
        if sure and plain and as_initialised(_rows(checkpoint, book)[:_MOST]):
            yield f"the codes of {book.key} look as an initialisation draws them: untrained, or fixed on purpose"


def alive(checkpoint: Checkpoint, book: FoundCodebook) -> int | None:
    """How many codes have latents by the running counts beside them. None where there are none, or they are all alike,
    as before the first step."""
    for key in book.companions:
        counts = math.prod(checkpoint.shapes[key]) == book.size and COUNTS.search(key.rpartition(".")[2])
        if counts and _is_read(checkpoint, key):
            return alive_of(numbers(checkpoint, key))
    return None


def alive_of(counts: NDArray[np.float64]) -> int | None:
    """The same, of counts (size,)."""
    if not np.isfinite(counts).all() or (counts < 0).any() or (counts == counts[:1]).all():
        return None
    return int((counts > ALIVE * counts.mean()).sum())


def alive_line(living: int, book: FoundCodebook) -> str:
    """That in words."""
    return f"{book.key}: {living:,} of {book.size:,} alive by its own counts"


def told_by_file(checkpoint: Checkpoint, books: Iterable[FoundCodebook]) -> Iterator[str]:
    """What `measure` says without data: codebooks that look untrained, and those whose counts call some codes dead."""
    books = [*books]
    yield from untrained(checkpoint, books)
    for book in books:
        living = alive(checkpoint, book)
        if living is not None and living < book.size:
            yield alive_line(living, book)


def flags(codebook_key: str, keys: Iterable[str]) -> list[str]:
    """Keys beside the codebook that say whether it was initialized: they must say yes, or the library starts anew."""
    return beside(codebook_key, keys, FLAG)


def beside(codebook_key: str, keys: Iterable[str], pattern: re.Pattern[str]) -> list[str]:
    """Those of the module that holds the codebook, or of the one around it: quantize.embedding.weight, quantize.x."""
    module = codebook_key.removesuffix(".weight").rpartition(".")[0]
    scopes = {codebook_key.rpartition(".")[0], module}
    return [key for key in keys if key.rpartition(".")[0] in scopes and pattern.search(key)]


def numbers(checkpoint: Checkpoint, key: str) -> NDArray[np.float64]:
    """(n,) the numbers of a tensor, flat. Raises KeyError for dtypes that numpy does not have, as of 8 bits."""
    dtype = checkpoint.dtypes[key]
    stored = np.frombuffer(b"".join(checkpoint.chunks(key)), _NUMPY[dtype])
    if dtype == "BF16":
        stored = (stored.astype("<u4") << 16).view("<f4")
    return stored.astype(np.float64)


def _is_read(checkpoint: Checkpoint, key: str) -> bool:
    """Whether `numbers` knows the dtype of a tensor."""
    return checkpoint.dtypes[key] in _NUMPY


def _rows(checkpoint: Checkpoint, book: FoundCodebook) -> NDArray[np.float64]:
    whole = numbers(checkpoint, book.key).reshape(checkpoint.shapes[book.key])
    return np.moveaxis(whole, book.axis, 0)[: book.size].reshape(book.size, -1)
