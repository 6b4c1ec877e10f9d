"""A symptom: codes that are the same as others, or as good as that."""

from __future__ import annotations

import torch
from torch import Tensor

from codebook_tools.clustering.metric import prepared
from codebook_tools.diagnosis.evidence import BookEvidence
from codebook_tools.diagnosis.finding import Finding, judged

SAME = 1e-6
"""Of the codes' variance: squared distances below it tell nobody apart."""

MANY, SOME = 0.1, 0.01
"""Shares of the codes."""

_ROWS = 1024


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
    """(size,) bool: whether a code (size, dim) of a lower index is the same."""
    rows = (codes - codes.mean(0)).double()  # whose products do not round away what tells codes apart
    limit = SAME * float(rows.square().sum(1).mean())
    duplicates = torch.zeros(len(rows), dtype=torch.bool)
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS]
        near = torch.cdist(part, rows[: start + len(part)]).square() <= limit
        duplicates[start : start + len(part)] = near.tril(start - 1).any(1)
    return duplicates
