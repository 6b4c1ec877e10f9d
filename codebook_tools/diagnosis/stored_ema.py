"""The tensors beside a codebook: running counts and sums, and flags of initialization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.effective import effective
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.clustering.metric import unit
from codebook_tools.errors import CodebookError
from codebook_tools.models.ema_state import SMOOTHINGS, Role, smoothed
from codebook_tools.models.evidence import alive_of, flags
from codebook_tools.models.stored_codes import followers, stored_rows

_LEAST = 1e-5  # that libraries divide by


@dataclass(frozen=True, eq=False)
class Companions:
    """The tensors of a file beside a codebook.

    Attributes:
        counts: (size,) float64, the running counts; None where there are none, or all are 0.
        codes: (size, dim) float32, running sums over running counts; None without both.
        moved: (size,) float64, the squared distance from each code to the one that a training step makes of the sums
            and counts, in whichever smoothing it is least; None without both.
        flags: Whether each is set, by key.
        unlike: Keys whose shape does not follow the codebook's size.
        unknown: Why the roles of the tensors are not known, in a line; empty where they are.
    """

    counts: Tensor | None = None
    codes: Tensor | None = None
    moved: Tensor | None = None
    flags: Mapping[str, bool] = field(default_factory=dict)
    unlike: tuple[str, ...] = ()
    unknown: str = ""

    @property
    def alive(self) -> int | None:
        """Number of codes with latents by the running counts; None without those."""
        return None if self.counts is None else alive_of(self.counts.numpy())


def companions_of(checkpoint: Checkpoint, book: FoundCodebook, original: FoundCodebook | None = None) -> Companions:
    """Read the tensors beside a codebook.

    Args:
        checkpoint: The file.
        book: The codebook in it.
        original: The codebook in the original's file, whose companions are expected here; None without one.
    """
    set_ = {key: bool(checkpoint.tensor(key).bool().all()) for key in flags(book.key, checkpoint.entries)}
    expected = original.companions if original else ()
    unlike = tuple(key for key in expected if key in checkpoint.entries and key not in book.companions)
    try:
        by_role = {one.role: one for one in followers(checkpoint, book)}
    except CodebookError as error:
        return Companions(flags=set_, unlike=unlike, unknown=str(error))
    counted, summed = by_role.get(Role.COUNTS) or by_role.get(Role.SHARES), by_role.get(Role.SUMS)
    how = effective(book, checkpoint.shapes)
    counts = sums = None
    if counted is not None and checkpoint.tensor(counted.key).numel() == book.size:
        counts = checkpoint.tensor(counted.key).double().reshape(-1)
    elif how.kind == "ratio":  # the codebook's own tensor is the sums
        counts = checkpoint.tensor(how.beside[0]).double().reshape(-1)
    if summed is not None and checkpoint.tensor(summed.key).numel() == book.size * book.dim and how.kind != "ratio":
        sums = checkpoint.tensor(summed.key).double().movedim(summed.axis or 0, 0).reshape(book.size, -1)
    rows = stored_rows(checkpoint.tensor(book.key), book).double()
    return of_state(rows, sums, counts, Companions(flags=set_, unlike=unlike))


def of_state(rows: Tensor, sums: Tensor | None, counts: Tensor | None, others: Companions) -> Companions:
    """With what running sums (size, dim) and counts (size,) say of codes (size, dim). others: known without them."""
    empty = counts is None or not float(counts.sum()) > 0
    codes = moved = None
    if sums is not None and counts is not None:
        # Nothing was counted yet: libraries begin with the codes themselves for sums.
        made = (
            [sums] if empty else [sums / smoothed(counts, epsilon).clamp(min=_LEAST)[:, None] for epsilon in SMOOTHINGS]
        )
        if bool(((rows.norm(dim=1) - 1).abs() <= 1e-2).all()):  # sums of codes by the cosine need not be as long
            made = [unit(one) for one in made]
        moved = torch.stack([(rows - one).square().sum(1) for one in made]).amin(0)
        codes = made[0].float()
    return Companions(None if empty else counts, codes, moved, others.flags, others.unlike)
