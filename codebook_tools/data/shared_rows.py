"""Test rows that are also calibration rows, by hashes of their bytes."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from codebook_tools.data.rows import BLOCK, Numbers, RowFile, Rows
from codebook_tools.data.sampling import mixed
from codebook_tools.errors import CodebookError


def content_hashes(file: RowFile, numbers: Numbers) -> NDArray[np.uint64]:
    """(n,) hashes of the rows' stored bytes: equal rows have equal hashes."""
    rows = file.stored(numbers).contiguous().flatten(1)
    stored = rows.view(torch.uint8).numpy()
    padded = np.zeros((len(stored), -(-stored.shape[1] // 8) * 8), dtype=np.uint8)
    padded[:, : stored.shape[1]] = stored
    words = padded.view(np.uint64)
    salts = mixed(np.arange(1, words.shape[1] + 1, dtype=np.uint64))
    total = np.zeros(len(words), dtype=np.uint64)
    for column, salt in zip(words.T, salts, strict=True):
        total += mixed(column ^ salt)
    return total


def refuse_shared_rows(data: Rows, test: Rows) -> None:
    """Raise CodebookError for a test row that is stored in the same bytes as a calibration row."""
    for kind in {_kind(file) for file in data.files} & {_kind(file) for file in test.files}:
        of_test = [batch for batch in test.batches(BLOCK) if _kind(batch.file) == kind]
        tested = [content_hashes(batch.file, batch.numbers) for batch in of_test]
        known = np.unique(np.concatenate(tested)) if tested else np.empty(0, dtype=np.uint64)
        for batch in data.batches(BLOCK):
            if _kind(batch.file) != kind:
                continue
            own = content_hashes(batch.file, batch.numbers)
            for at in np.flatnonzero(np.isin(own, known))[:1]:
                other, row = next(
                    (b, int(np.flatnonzero(h == own[at])[0]))
                    for b, h in zip(of_test, tested, strict=True)
                    if own[at] in h
                )
                raise CodebookError(
                    f"test item {other[row]} is also in --data, as {batch[int(at)]}: take it out of --data, "
                    "or leave out --test-data to have a tenth split off"
                )


def _kind(file: RowFile) -> tuple[torch.dtype, tuple[int, ...]]:
    rows = file.mapped()
    return rows.dtype, tuple(rows.shape[1:])
