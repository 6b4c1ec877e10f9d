"""What a file alone says of its codebooks: unset flags, untrained codes, and codes alive by its running counts.

It is read by numpy: no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codebook_tools.checkpoints.detect import COUNTS, FoundCodebook
from codebook_tools.checkpoints.effective import effective
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.models.initialization import as_initialized

FLAG = re.compile(r"(?:^|\.|_)(?:is_)?(?:init(?:t?ed|iali[sz]ed)?|data_initiali[sz]ed)$")

ALIVE = 1e-3
"""Share of the mean running count below which a code has had no latents for long."""

_LEAST, _MOST = 16, 16_384  # codes that a test of their distribution needs, and that suffice for it
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2"}
_NUMPY |= {"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "I8": "i1", "BOOL": "u1"}


def uninitialized(checkpoint: Checkpoint, books: Iterable[FoundCodebook]) -> Iterator[str]:
    """Warnings of every command: codebooks that were not initialized, a line each."""
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
    """Warnings of `inspect` and `measure`: codebooks that seem untrained, a line each."""
    for book in books:
        sure = book.confidence == "high" and book.size >= _LEAST and _is_read(checkpoint, book.key)
        plain = effective(book, checkpoint.shapes).kind == "rows"
        if sure and plain and as_initialized(_rows(checkpoint, book)[:_MOST]):
            yield f"the codes of {book.key} look as an initialization draws them: untrained, or fixed on purpose"


def alive(checkpoint: Checkpoint, book: FoundCodebook) -> int | None:
    """How many codes are in use by the running counts; None without counts, or where all are equal (untrained)."""
    for key in book.companions:
        counts = math.prod(checkpoint.shapes[key]) == book.size and COUNTS.search(key.rpartition(".")[2])
        if counts and _is_read(checkpoint, key):
            return alive_of(numbers(checkpoint, key))
    return None


def alive_of(counts: NDArray[np.float64]) -> int | None:
    """As `alive`, for counts (size,)."""
    if not np.isfinite(counts).all() or (counts < 0).any() or (counts == counts[:1]).all():
        return None
    return int((counts > ALIVE * counts.mean()).sum())


def alive_line(living: int, book: FoundCodebook) -> str:
    """The warning that `living` codes are alive."""
    return f"{book.key}: {living:,} of {book.size:,} alive by its own counts"


def told_by_file(checkpoint: Checkpoint, books: Iterable[FoundCodebook]) -> Iterator[str]:
    """Warnings of `measure` without data: codebooks that look untrained, and those with codes dead by their counts."""
    books = [*books]
    yield from untrained(checkpoint, books)
    for book in books:
        living = alive(checkpoint, book)
        if living is not None and living < book.size:
            yield alive_line(living, book)


def flags(codebook_key: str, keys: Iterable[str]) -> list[str]:
    """Keys beside the codebook that say whether it was initialized; unset, the library initializes it anew."""
    return beside(codebook_key, keys, FLAG)


def beside(codebook_key: str, keys: Iterable[str], pattern: re.Pattern[str]) -> list[str]:
    """Keys matching `pattern` in the codebook's module or the one around it: quantize.embedding.x, quantize.x."""
    module = codebook_key.removesuffix(".weight").rpartition(".")[0]
    scopes = {codebook_key.rpartition(".")[0], module}
    return [key for key in keys if key.rpartition(".")[0] in scopes and pattern.search(key)]


def numbers(checkpoint: Checkpoint, key: str) -> NDArray[np.float64]:
    """A tensor's numbers, (n,) float64. Raises KeyError for dtypes that numpy lacks, as 8-bit floats."""
    return _stored(checkpoint, key).astype(np.float64)


def _stored(checkpoint: Checkpoint, key: str) -> NDArray[Any]:
    """A tensor's numbers, (n,) in the stored dtype."""
    dtype = checkpoint.dtypes[key]
    stored = np.frombuffer(b"".join(checkpoint.chunks(key)), _NUMPY[dtype])
    return (stored.astype("<u4") << 16).view("<f4") if dtype == "BF16" else stored


def _is_read(checkpoint: Checkpoint, key: str) -> bool:
    """Whether `numbers` knows the dtype of a tensor."""
    return checkpoint.dtypes[key] in _NUMPY


def _rows(checkpoint: Checkpoint, book: FoundCodebook) -> NDArray[Any]:
    """(size, dim) in the stored dtype."""
    whole = _stored(checkpoint, book.key).reshape(checkpoint.shapes[book.key])
    return np.moveaxis(whole, book.axis, 0)[: book.size].reshape(book.size, -1)
