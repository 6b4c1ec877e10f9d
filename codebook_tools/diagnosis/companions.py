"""What the tensors beside a codebook say of it: the codes that running sums stand for, and whether flags are set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from codebook_tools.assignment import unit
from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.effective import effective
from codebook_tools.checkpoints.reading import Checkpoint
from codebook_tools.errors import CodebookError
from codebook_tools.models.companions import Role, flags
from codebook_tools.models.stored import followers, stored_rows


@dataclass(frozen=True, eq=False)
class Companions:
    """codes: (size, dim) float32, what running sums over running counts are, and hits: (size,) of each; None where the
    file has no such state. apart: mean squared distance from the rows to those codes, over the rows' variance, both
    weighted by the hits. flags: whether each is set, by key. unlike: keys whose shape does not follow the codebook's
    size."""

    codes: Tensor | None
    hits: Tensor | None
    apart: float | None
    flags: Mapping[str, bool]
    unlike: tuple[str, ...]


def companions_of(checkpoint: Checkpoint, found: FoundCodebook, original: FoundCodebook | None) -> Companions:
    """original: where the codebook lies in the original's file, which knows which tensors ought to follow."""
    set_ = {key: bool(checkpoint.tensor(key).bool().all()) for key in flags(found.key, checkpoint.entries)}
    expected = original.companions if original else ()
    unlike = tuple(key for key in expected if key in checkpoint.entries and key not in found.companions)
    state = running(checkpoint, found)
    if state is None:
        return Companions(None, None, None, set_, unlike)
    codes, hits = state
    return Companions(codes, hits, _apart(stored_rows(checkpoint.tensor(found.key), found), codes, hits), set_, unlike)


def running(checkpoint: Checkpoint, found: FoundCodebook) -> tuple[Tensor, Tensor] | None:
    """(size, dim) and (size,) float32: running sums over running counts, as training would go on from them, and the
    counts. None without both, and where the sums are the codebook itself."""
    try:
        by_role = {one.role: one for one in followers(checkpoint, found)}
    except CodebookError:  # one that nobody understands: what it holds cannot be judged
        return None
    counted = by_role.get(Role.COUNTS) or by_role.get(Role.SHARES)
    if Role.SUMS not in by_role or counted is None or effective(found, checkpoint.shapes).kind == "ratio":
        return None
    summed = by_role[Role.SUMS]
    hits, sums = checkpoint.tensor(counted.key).float(), checkpoint.tensor(summed.key).float()
    if hits.numel() != found.size or sums.numel() != found.size * found.dim:
        return None
    rows, hits = sums.movedim(summed.axis or 0, 0).reshape(found.size, -1), hits.reshape(-1)
    if float(hits.sum()) <= 0:  # nothing was counted yet: libraries begin with the codes themselves for sums
        return rows, torch.ones(found.size)
    return rows / hits[:, None].clamp(min=1e-5), hits


def _apart(rows: Tensor, codes: Tensor, hits: Tensor) -> float:
    """Rows at unit length are held against directions: sums of a codebook by the cosine need not be as long."""
    if torch.allclose(rows.norm(dim=1), torch.ones(len(rows)), atol=1e-2):
        codes = unit(codes)
    shares = hits / hits.sum()
    mean = (shares[:, None] * rows).sum(0)
    spread = (shares * (rows - mean).square().sum(1)).sum()
    return float((shares * (rows - codes).square().sum(1)).sum() / spread.clamp(min=1e-30))
