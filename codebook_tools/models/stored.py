"""The effective codes of a file, from and to the tensors that it stores: rows, sums over counts, projected, padded."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.effective import effective
from codebook_tools.checkpoints.entries import torch_dtype
from codebook_tools.checkpoints.reading import Checkpoint
from codebook_tools.errors import CodebookError
from codebook_tools.models.companions import companion_values, flags, held, laid_out, recent

_LEAST = 1e-5  # Mimi's own clamp of the counts that its sums are divided by


def stored_rows(tensor: Tensor, found: FoundCodebook) -> Tensor:
    """(size, dim) float32: the rows of a codebook's tensor, whichever way its axes lie, without padding."""
    return exact_rows(tensor, found).float()


def exact_rows(tensor: Tensor, found: FoundCodebook) -> Tensor:
    """The same in the stored dtype."""
    rows = tensor.movedim(found.axis, 0)[: found.size]
    return rows.flatten(1) if rows.ndim > 1 else rows[:, None]


def effective_rows(checkpoint: Checkpoint, found: FoundCodebook) -> Tensor:
    """(size, dim) float32: the codes as the decoder sees them. found.size: of this file.

    Raises CodebookError where some are not finite, or made of the stored rows by a network.
    """
    rows, how = stored_rows(checkpoint.tensor(found.key), found), effective(found, checkpoint.shapes)
    if how.kind == "network":
        raise CodebookError(
            f"the codes of {found.key} are made of its rows by layers, {', '.join(how.beside[:2])}: they can be "
            "inspected, not operated on"
        )
    beside = [checkpoint.tensor(key).float() for key in how.beside]
    if how.kind == "ratio":
        rows = rows / beside[0].reshape(-1, 1).clamp(min=_LEAST)
    elif how.kind == "projected":
        rows = torch.nn.functional.linear(rows, *beside)
    if not bool(torch.isfinite(rows).all()):
        raise CodebookError(f"{found.key} in {checkpoint.path} is not finite")
    return rows


def owned_keys(checkpoint: Checkpoint, found: FoundCodebook) -> set[str]:
    """The file's keys that belong to a codebook and follow it."""
    how = effective(found, checkpoint.shapes)
    beside = {*flags(found.key, checkpoint.entries), *recent(found.key, checkpoint.entries)}
    return {found.key, *found.companions, *how.beside} | beside


def added_bytes(checkpoint: Checkpoint, found: FoundCodebook, size: int) -> int:
    """By how much the file grows with `size` codes and what follows them; negative where it shrinks."""
    entry = checkpoint.entries[found.key]
    row = entry.nbytes // entry.shape[found.axis]
    return (size - found.size) * (row + sum(checkpoint.entries[key].nbytes // found.size for key in found.companions))


def rounded(checkpoint: Checkpoint, found: FoundCodebook, rows: Tensor) -> Tensor:
    """rows (size, dim) float32 as the stored dtype has them. Raises CodebookError where it cannot hold them."""
    dtype = torch_dtype(checkpoint.entries[found.key].dtype)
    held_rows = rows.to(dtype).float()
    if not bool(torch.isfinite(held_rows).all()):
        raise CodebookError(f"the new codes of {found.key} do not fit {dtype}: some are not finite in it")
    return held_rows


def changed_codebook(
    checkpoint: Checkpoint, found: FoundCodebook, rows: Tensor, counts: Tensor, index_map: Tensor
) -> dict[str, Tensor]:
    """The codebook's tensor and what follows it, by file key, for new effective rows (size, dim) and their counts.

    index_map: (found.size,) int64, the new row that each old code lives on in, negative for none.

    Raises CodebookError where the file's layout has no room for such codes.
    """
    stored = {key: checkpoint.tensor(key) for key in owned_keys(checkpoint, found)}
    how, old = effective(found, checkpoint.shapes), stored[found.key]
    # A code without hits counts one: with none, its running sum is 0, and the model's own EMA moves it there.
    hits = counts.clamp(min=1)
    beside = dict[str, Tensor]()
    if how.kind == "ratio":
        # Powers of two: code * count / count is then the code, to the last bit.
        hits = held(rows, hits.double().log2().round().exp2(), [old.dtype]).log2().floor().exp2()
        tensor = rows * hits[:, None]
    elif how.kind == "projected":
        tensor, beside = _behind_identity(found, rows, [stored[key] for key in how.beside], how.beside)
    else:
        tensor = _unchanged(rows, exact_rows(old, found), index_map) if old.dtype == torch.float64 else rows
    padding = old.movedim(found.axis, 0)[found.size :].flatten(1).to(tensor.dtype)
    tensor = laid_out(torch.cat([tensor, padding]), old, found.axis)
    followed = rows if how.kind == "ratio" else stored_rows(tensor, replace(found, size=len(rows)))
    return {found.key: tensor} | companion_values(found, stored, followed, hits) | beside


def _unchanged(rows: Tensor, old: Tensor, index_map: Tensor) -> Tensor:
    """float64 rows, with all digits of the old ones that live on and were not moved: float32 has half of them."""
    kept = torch.nonzero(index_map >= 0)[:, 0]
    kept = kept[(old[kept].float() == rows[index_map[kept]]).all(1)]
    wide = rows.double()
    wide[index_map[kept]] = old[kept]
    return wide


def _behind_identity(
    found: FoundCodebook, rows: Tensor, layer: list[Tensor], keys: tuple[str, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Stored rows and a projection that gives them out as `rows`, to the last bit: the identity, padded with zeros."""
    out, into = layer[0].shape
    if out > into:
        raise CodebookError(
            f"{found.key} has {into} numbers a row, projected to {out}: no room for codes in all {out} dimensions"
        )
    meant = [torch.eye(out, into), torch.zeros(out)]
    values = {key: new.to(old.dtype) for key, old, new in zip(keys, layer, meant, strict=False)}
    return torch.nn.functional.pad(rows, (0, into - out)), values
