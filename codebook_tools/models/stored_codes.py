"""Effective codes from stored tensors and back: plain rows, sums over counts, projected, padded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.effective import effective
from codebook_tools.checkpoints.forms import StepKind
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.checkpoints.tensors import torch_dtype
from codebook_tools.errors import CodebookError
from codebook_tools.models.ema_state import (
    Companion,
    companion_values,
    companions_of,
    laid_out,
    recent,
    scaled_counts,
)
from codebook_tools.models.evidence import flags

_LEAST = 1e-5  # Mimi's own clamp of the counts that its sums are divided by
_SINGULAR = 1e6  # condition of a matrix, above which float32 rows no longer give the codes that were meant


class Tensors(Protocol):
    """Tensors by file key: a checkpoint's, or those of a module that has loaded one."""

    @property
    def path(self) -> Path:
        """Of the file, for messages."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By file key."""

    def tensor(self, key: str) -> Tensor:
        """The tensor of a file key, on the CPU."""


def stored_rows(tensor: Tensor, book: FoundCodebook) -> Tensor:
    """The rows of a codebook's tensor, (size, dim) float32, without padding."""
    return exact_rows(tensor, book).float()


def exact_rows(tensor: Tensor, book: FoundCodebook) -> Tensor:
    """As `stored_rows`, in the stored dtype."""
    rows = tensor.movedim(book.axis, 0)[: book.size]
    # Contiguous: products of the same numbers in another order of memory may round otherwise.
    return (rows.flatten(1) if rows.ndim > 1 else rows[:, None]).contiguous()


def effective_rows(tensors: Tensors, book: FoundCodebook) -> Tensor:
    """The codes that the decoder gets, (size, dim) float32.

    Args:
        tensors: The file.
        book: The codebook, with the size that it has in that file.

    Raises:
        CodebookError: Some are not finite, or layers of the network make them of the stored rows.
    """
    codes = codes_of_rows(tensors, book, stored_rows(tensors.tensor(book.key), book))
    if not bool(torch.isfinite(codes).all()):
        raise CodebookError(f"{book.key} in {tensors.path} is not finite")
    return codes


def codes_of_rows(tensors: Tensors, book: FoundCodebook, rows: Tensor) -> Tensor:
    """The codes that the decoder gets for stored rows.

    Args:
        tensors: The file.
        book: The codebook.
        rows: (n, stored dim) float32.

    Returns:
        (n, dim) float32.

    Raises:
        CodebookError: Layers of the network make them.
    """
    how = effective(book, tensors.shapes)
    if how.kind in ("network", "opaque"):
        raise CodebookError(
            f"the codes of {book.key} are made of its rows by layers, {', '.join(how.beside[:2])}: they can be "
            "inspected, not operated on"
        )
    beside = [tensors.tensor(key).float() for key in how.beside]
    if how.kind == "ratio":
        return rows / beside[0].reshape(-1, 1).clamp(min=_LEAST)
    if how.kind == "projected":
        weight, *bias = beside
        return _alike(rows, functional.linear(rows, weight, bias[0] if bias else None))
    if how.kind == "steps":
        rows = functional.normalize(rows, dim=1) if how.unit_first else rows
        for kind, tensor in zip(how.with_tensors, beside, strict=True):
            rows = _alike(rows, _forward(kind, rows, tensor))
    return rows


def _forward(kind: StepKind, rows: Tensor, tensor: Tensor) -> Tensor:
    if kind == "matrix":
        return functional.linear(rows, _matrix(tensor))
    if kind == "matrix-transposed":
        return rows @ _matrix(tensor)
    if kind == "shift":
        return rows + tensor.reshape(-1)
    return rows * (tensor.reshape(-1) + (kind == "one-plus-scale"))


def _alike(rows: Tensor, codes: Tensor) -> Tensor:
    """codes (n, dim), made equal where their rows (n, stored dim) are equal.

    The last bits of a product depend on the row's position, by which copies of a row would differ.
    """
    first = dict[bytes, int]()
    places = [first.setdefault(row.tobytes(), i) for i, row in enumerate(rows.cpu().numpy())]
    return codes if len(first) == len(places) else codes[torch.tensor(places, device=codes.device)]


def _backward(kind: StepKind, codes: Tensor, tensor: Tensor, key: str) -> Tensor:
    """The inverse of `_forward`, for codes (n, dim) float64. Raises CodebookError where there is none."""
    if kind == "shift":
        return codes - tensor.reshape(-1).double()
    if kind in ("matrix", "matrix-transposed"):
        matrix = _matrix(tensor).double()
        if float(torch.linalg.cond(matrix)) > _SINGULAR:
            raise CodebookError(
                f"new codes cannot be written: they pass through {key}, which has no inverse; prune, or keep the most "
                "used with prune --keep"
            )
        inverse: Tensor = torch.linalg.inv(matrix if kind == "matrix-transposed" else matrix.T)
        return codes @ inverse
    scale = tensor.reshape(-1).double() + (kind == "one-plus-scale")
    if bool((scale == 0).any()):
        raise CodebookError(f"new codes cannot be written: they are scaled by {key}, which has zeros; prune instead")
    return codes / scale


def _matrix(tensor: Tensor) -> Tensor:
    """(dim, dim): a linear layer, or a convolution of one pixel."""
    return tensor.reshape(tensor.shape[:2])


def rows_of_codes(
    checkpoint: Checkpoint, book: FoundCodebook, codes: Tensor, *, old: Tensor | None = None
) -> Tensor | None:
    """The stored rows of which the model makes some codes.

    A code that equals an old one bit by bit keeps its row, so that dropping codes loses nothing.

    Args:
        checkpoint: The file.
        book: The codebook in it.
        codes: (n, dim) float32.
        old: (book.size, dim), the file's effective codes, where they cannot be computed from its rows.

    Returns:
        (n, stored dim) float32, rounded to the stored dtype; None where codes are written as they are.

    Raises:
        CodebookError: New codes pass through what has no inverse.
    """
    how = effective(book, checkpoint.shapes)
    if how.kind not in ("steps", "opaque"):
        return None
    before = stored_rows(checkpoint.tensor(book.key), book)
    codes_before = effective_rows(checkpoint, book) if old is None else old
    places = {code.tobytes(): i for i, code in enumerate(codes_before.cpu().numpy())}
    at = torch.tensor([places.get(code.tobytes(), -1) for code in codes.cpu().numpy()])
    rows = before[at.clamp(min=0)]
    new = at < 0
    if bool(new.any()):
        if how.kind == "opaque":
            raise CodebookError(
                f"{int(new.sum())} new codes of {book.key} cannot be written: the model's quantize makes codes of its "
                "rows in a way that cannot be inverted; prune, or keep the most used with prune --keep"
            )
        inverse = codes[new].cpu().double()
        for kind, key in reversed(list(zip(how.with_tensors, how.beside, strict=True))):
            inverse = _backward(kind, inverse, checkpoint.tensor(key), key)
        rows = rows.clone()
        rows[new] = functional.normalize(inverse, dim=1).float() if how.unit_first else inverse.float()
    return rounded(checkpoint, book, rows)


def owned_keys(checkpoint: Checkpoint, book: FoundCodebook) -> set[str]:
    """The file's keys of a codebook and its companions, under all of its names."""
    how = effective(book, checkpoint.shapes)
    beside = set(how.beside) if how.kind in ("ratio", "projected", "network") else set[str]()
    for place in book.places:
        beside |= {*flags(place.key, checkpoint.entries), *recent(place.key, checkpoint.entries)}
        beside |= {place.key, *place.companions}
    return beside


def added_bytes(checkpoint: Checkpoint, book: FoundCodebook, size: int) -> int:
    """The bytes by which the file grows with `size` codes and their companions; negative where it shrinks."""
    nbytes = 0
    for place in book.places:
        entry = checkpoint.entries[place.key]
        nbytes += entry.nbytes // entry.shape[place.axis]
        nbytes += sum(checkpoint.entries[key].nbytes // place.size for key in place.companions)
    return (size - book.size) * nbytes


def rounded(checkpoint: Checkpoint, book: FoundCodebook, rows: Tensor) -> Tensor:
    """rows (size, dim) float32, rounded to the stored dtype. Raises CodebookError where some are not finite in it."""
    dtype = torch_dtype(checkpoint.entries[book.key].dtype)
    held_rows = rows.to(dtype).float()
    if not bool(torch.isfinite(held_rows).all()):
        raise CodebookError(f"the new codes of {book.key} do not fit {dtype}: some are not finite in it")
    return held_rows


def followers(checkpoint: Checkpoint, book: FoundCodebook) -> tuple[Companion, ...]:
    """The role of each tensor beside a codebook. Raises CodebookError, naming it, where one is unknown."""
    stored = {key: checkpoint.tensor(key) for key in _beside(checkpoint, book)}
    how = effective(book, checkpoint.shapes)
    rows = exact_rows(checkpoint.tensor(book.key), book)
    if how.kind == "ratio":  # the rows are the sums; the codes are what they are over the counts
        rows = effective_rows(checkpoint, replace(book, also=()))
    return companions_of(book, rows, stored, checkpoint.declared)


def _beside(checkpoint: Checkpoint, book: FoundCodebook) -> list[str]:
    keys = {*book.companions, *flags(book.key, checkpoint.entries), *recent(book.key, checkpoint.entries)}
    return sorted(keys)


def changed_codebook(
    checkpoint: Checkpoint,
    book: FoundCodebook,
    codes: Tensor,
    counts: Tensor,
    index_map: Tensor,
    rows: Tensor | None = None,
) -> dict[str, Tensor]:
    """The new tensors of a codebook and its companions, by file key, under all of its names.

    Args:
        checkpoint: The old file.
        book: The codebook in it.
        codes: (size, dim) float32, the new effective codes, rounded.
        counts: (size,), how often each is used.
        index_map: (book.size,) int64, the new index of each old code, negative for none.
        rows: (size, stored dim), as from `rows_of_codes`.

    Raises:
        CodebookError: The file's layout has no room for such codes, or a companion's role is unknown.
    """
    changed = dict[str, Tensor]()
    for place in book.places:
        changed |= _changed_place(checkpoint, replace(place, form=book.form), codes, counts, index_map, rows)
    return changed


def _changed_place(
    checkpoint: Checkpoint, book: FoundCodebook, codes: Tensor, counts: Tensor, index_map: Tensor, rows: Tensor | None
) -> dict[str, Tensor]:
    how, old = effective(book, checkpoint.shapes), checkpoint.tensor(book.key)
    stored = {key: checkpoint.tensor(key) for key in (*_beside(checkpoint, book), *how.beside)}
    # A code without hits gets one: with none, its running sum is 0, and the model's own EMA would move it there.
    hits = counts.clamp(min=1)
    beside = dict[str, Tensor]()
    if how.kind == "ratio":
        # Powers of two: code * count / count is then the code, to the last bit.
        hits = scaled_counts(codes, hits.double().log2().round().exp2(), [old.dtype]).log2().floor().exp2()
        tensor = codes * hits[:, None]
    elif how.kind == "projected":
        tensor, beside = _behind_identity(book, codes, [stored[key] for key in how.beside], how.beside)
    elif rows is not None:
        tensor = rows
    else:
        tensor = _unchanged(codes, exact_rows(old, book), index_map) if old.dtype == torch.float64 else codes
    padding = old.movedim(book.axis, 0)[book.size :].flatten(1).to(tensor.dtype)
    tensor = laid_out(torch.cat([tensor, padding]), old, book.axis)
    followed = codes if how.kind == "ratio" else stored_rows(tensor, replace(book, size=len(codes)))
    values = companion_values(book, followers(checkpoint, book), stored, followed, hits)
    return {book.key: tensor} | values | beside


def _unchanged(rows: Tensor, old: Tensor, index_map: Tensor) -> Tensor:
    """float64 rows, those of codes that were not moved with all digits of the old ones."""
    kept = torch.nonzero(index_map >= 0)[:, 0]
    kept = kept[(old[kept].float() == rows[index_map[kept]]).all(1)]
    wide = rows.double()
    wide[index_map[kept]] = old[kept]
    return wide


def _behind_identity(
    book: FoundCodebook, rows: Tensor, layer: list[Tensor], keys: tuple[str, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Stored rows and a projection that maps them to `rows` bit by bit: the identity, padded with zeros."""
    out, into = layer[0].shape
    if out > into:
        raise CodebookError(
            f"{book.key} has {into} numbers a row, projected to {out}: no room for codes in all {out} dimensions"
        )
    meant = [torch.eye(out, into), torch.zeros(out)]
    values = {key: new.to(old.dtype) for key, old, new in zip(keys, layer, meant, strict=False)}
    return functional.pad(rows, (0, into - out)), values
