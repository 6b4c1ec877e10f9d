"""A symptom: codes that are the same as others, or as good as that."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from codebook_tools.clustering.metric import prepared
from codebook_tools.diagnosis.evidence import BookEvidence
from codebook_tools.diagnosis.finding import Finding, judged

SAME = 1e-6
"""Of the codes' variance: squared distances below it tell nobody apart."""

MANY, SOME = 0.1, 0.01
"""Shares of the codes."""

_ROWS, _COLUMNS = 256, 16_384  # of distances at a time


def duplicate_codes(book: BookEvidence) -> Finding:
    """Found where over a tenth are copies of a code of a lower index; copies of code 0 that fill a size up are none."""
    codes = prepared(book.codebook).vectors
    twins = copies(codes)
    if book.filling:
        twins &= (codes != codes[0]).any(1)
    share = float(twins.float().mean())
    summary = f"{int(twins.sum())} of {len(codes)} codes are copies of others"
    return Finding(judged(share, MANY, SOME), share, MANY, summary)


def copies(codes: Tensor) -> Tensor:
    """(size,) bool: whether a code (size, dim) of a lower index is the same.

    Equal codes are told by sorting. Of the others only those are compared that are as near along the axis on which
    codes vary most: memory does not grow with the square of their number, and time hardly does.
    """
    _, first, inverse = np.unique(codes.numpy(), axis=0, return_index=True, return_inverse=True)
    duplicates = torch.from_numpy(first[inverse.reshape(-1)] != np.arange(len(codes)))
    centered = (codes - codes.mean(0)).double()  # whose products do not round away what tells codes apart
    limit = SAME * float(centered.square().sum(1).mean())
    index = torch.from_numpy(first)
    rows = centered[index]
    along = rows @ torch.linalg.eigh(centered.T @ centered).eigenvectors[:, -1]
    order = along.argsort()
    rows, along, index = rows[order], along[order], index[order]
    reach = limit**0.5 + 1e-9 * float(along.abs().max())
    for start in range(0, len(rows), _ROWS):
        at = slice(start, start + _ROWS)
        ends = torch.stack([along[at][0] - reach, along[at][-1] + reach])
        first, last = torch.searchsorted(along, ends, right=True).tolist()
        for left in range(first, last, _COLUMNS):
            others = slice(left, min(last, left + _COLUMNS))
            near = torch.cdist(rows[at], rows[others]).square() <= limit
            duplicates[index[at][(near & (index[others] < index[at, None])).any(1)]] = True
    return duplicates
