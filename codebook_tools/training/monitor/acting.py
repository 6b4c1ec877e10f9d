"""What a monitor does to a codebook between two training steps: codes, EMA state and the optimizer's moments move."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from codebook_tools.clustering.assignment import nearest
from codebook_tools.clustering.seeding import count_distinct, draw_by_error
from codebook_tools.codebook import REMOVED, Codebook, Metric, Surgery
from codebook_tools.errors import CodebookError
from codebook_tools.models.stored_codes import followers
from codebook_tools.models.wrapped import carried_counts, in_memory, install
from codebook_tools.runtime import distributed
from codebook_tools.strategies.refit import Refit
from codebook_tools.training.codebook_ema import DEAD_BELOW
from codebook_tools.training.monitor.quantizers import Quantizer

_COUNT = "leave out revive_every and refit_at"


def require_movable(quantizer: Quantizer) -> None:
    """Raise CodebookError where the codes of a quantizer cannot be moved one by one."""
    if quantizer.form.kind != "rows":
        raise CodebookError(
            f"{quantizer.book.key}: its codes are made of stored rows by {', '.join(quantizer.form.beside)}; "
            f"a monitor counts them, but cannot move them: {_COUNT}"
        )
    try:
        followers(in_memory(type(quantizer.model).__name__, quantizer.part().state_dict()), quantizer.book)
    except CodebookError as error:
        raise CodebookError(f"{str(error).partition('; say so')[0]}: {_COUNT}") from error


def dead_codes(counts: Tensor) -> Tensor | None:
    """(size,) bool, the codes far below the mean of counts (size,); None where there are too few counts to tell."""
    least = DEAD_BELOW * float(counts.sum()) / len(counts)
    return counts < least if least >= 1 else None


def revive(
    quantizer: Quantizer, metric: Metric, dead: Tensor, rows: Tensor, seed: int, optimizer: torch.optim.Optimizer
) -> int:
    """Move dead codes to latents that are drawn by squared error to the living ones.

    Args:
        quantizer: Whose codes they are.
        metric: By which it searches.
        dead: (size,) bool.
        rows: (n, dim) float32, recent latents in random order.
        seed: Of the drawing.
        optimizer: One that may hold moments of the codes; those of moved codes become 0.

    Returns:
        How many codes were moved.
    """
    codes = quantizer.codes()
    living = Codebook(codes[~dead.to(codes.device)], metric)
    rows = rows.to(codes.device)
    drawn = metric.emit(rows[draw_by_error(rows, living, int(dead.sum()), seed)])
    moved = dead.cpu().nonzero()[: len(drawn), 0]
    codes[moved.to(codes.device)] = drawn
    index_map = torch.arange(len(codes))
    index_map[moved] = REMOVED
    stay = (index_map >= 0).nonzero()[:, 0]
    before = [(tensor, axis, tensor.clone()) for tensor, axis in _per_code(quantizer)]
    surgery = Surgery(Codebook(codes, metric), index_map)
    install(surgery, quantizer.part(), codebook=quantizer.book.key, optimizer=optimizer)
    for tensor, axis, old in before:  # an EMA state holds more digits than its codes
        at = stay.to(tensor.device)
        tensor.index_copy_(axis, at, old.index_select(axis, at))
    _follow_first(quantizer, optimizer)
    return len(moved)


def refit(quantizer: Quantizer, metric: Metric, rows: Tensor, seed: int, optimizer: torch.optim.Optimizer) -> None:
    """Replace all codes by centroids of latents.

    Args:
        quantizer: Whose codes they are.
        metric: By which it searches.
        rows: (n, dim) float32, recent latents in random order.
        seed: Of k-means.
        optimizer: One that may hold moments of the codes, which become 0.

    Raises:
        CodebookError: There are fewer distinct latents than codes.
    """
    codes = quantizer.codes()
    rows, old = rows.to(codes.device), Codebook(codes, metric)
    size, key = len(codes), quantizer.book.key
    if count_distinct(metric.prepare(rows), enough=size) < size:
        raise CodebookError(f"refit_at: {quantizer.book.key} has {size} codes and got fewer distinct latents")
    surgery = Refit(k=size, seed=seed, device=str(codes.device))(old, [rows], torch.ones(size, dtype=torch.int64))
    hits = torch.bincount(nearest(rows, surgery.codebook), minlength=size).cpu()
    # An EMA of as many counts as before: more would hold the codes where they are.
    counts = hits / len(rows) * carried_counts(quantizer.part(), key, surgery.index_map).sum()
    install(surgery, quantizer.part(), codebook=key, counts=counts, optimizer=optimizer)
    _follow_first(quantizer, optimizer)


def _per_code(quantizer: Quantizer) -> Iterator[tuple[Tensor, int]]:
    """The codebook and what follows it: each tensor, and its axis of codes."""
    book, state = quantizer.book, quantizer.part().state_dict()
    for key in (book.key, *book.companions):
        axes = [axis for axis, length in enumerate(state[key].shape) if length == book.size]
        yield state[key], book.axis if book.axis in axes or not axes else axes[0]


def _follow_first(quantizer: Quantizer, optimizer: torch.optim.Optimizer) -> None:
    """Take the numbers of rank 0: another machine may round otherwise."""
    codes = quantizer.tensor
    state = optimizer.state.get(codes, {}) if isinstance(codes, nn.Parameter) else {}
    moments = [value for value in state.values() if isinstance(value, Tensor) and value.shape == codes.shape]
    distributed.follow_first([*(tensor for tensor, _ in _per_code(quantizer)), *moments])
