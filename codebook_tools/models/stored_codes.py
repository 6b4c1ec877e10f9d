"""The effective codes of a file, from and to the tensors that it stores: rows, sums over counts, projected, padded."""

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
    held,
    laid_out,
    recent,
)
from codebook_tools.models.evidence import flags

_LEAST = 1e-5  # Mimi's own clamp of the counts that its sums are divided by
_SINGULAR = 1e6  # condition of a matrix, above which float32 rows no longer give the codes that were meant


class Tensors(Protocol):
    """Tensors by file key: a checkpoint's, or those of a module that has loaded one."""

    @property
    def path(self) -> Path: ...

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def tensor(self, key: str) -> Tensor: ...


def stored_rows(tensor: Tensor, found: FoundCodebook) -> Tensor:
    """(size, dim) float32: the rows of a codebook's tensor, whichever way its axes lie, without padding."""
    return exact_rows(tensor, found).float()


def exact_rows(tensor: Tensor, found: FoundCodebook) -> Tensor:
    """The same in the stored dtype."""
    rows = tensor.movedim(found.axis, 0)[: found.size]
    # Contiguous: products of the same numbers in another order of memory may round otherwise.
    return (rows.flatten(1) if rows.ndim > 1 else rows[:, None]).contiguous()


def effective_rows(tensors: Tensors, found: FoundCodebook) -> Tensor:
    """(size, dim) float32: the codes as the decoder sees them. found.size: of this file.

    Raises CodebookError where some are not finite, or made of the stored rows by a network.
    """
    codes = codes_of_rows(tensors, found, stored_rows(tensors.tensor(found.key), found))
    if not bool(torch.isfinite(codes).all()):
        raise CodebookError(f"{found.key} in {tensors.path} is not finite")
    return codes


def codes_of_rows(tensors: Tensors, found: FoundCodebook, rows: Tensor) -> Tensor:
    """(n, dim) float32: what the decoder sees of stored rows (n, stored dim) float32."""
    how = effective(found, tensors.shapes)
    if how.kind in ("network", "opaque"):
        raise CodebookError(
            f"the codes of {found.key} are made of its rows by layers, {', '.join(how.beside[:2])}: they can be "
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
    """codes (n, dim) of rows (n, stored dim), those of equal rows equal: a product's last bits depend on where in the
    tensor its row stands, and copies would be told apart."""
    first = dict[bytes, int]()
    places = [first.setdefault(row.tobytes(), i) for i, row in enumerate(rows.cpu().numpy())]
    return codes if len(first) == len(places) else codes[torch.tensor(places, device=codes.device)]


def _backward(kind: StepKind, codes: Tensor, tensor: Tensor, key: str) -> Tensor:
    """codes (n, dim) float64 -> the rows of which `_forward` makes them. Raises CodebookError where there are none."""
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
    checkpoint: Checkpoint, found: FoundCodebook, codes: Tensor, *, old: Tensor | None = None
) -> Tensor | None:
    """(n, dim) float32, as the stored dtype has them: the rows of which the model makes these codes.

    None where rows are codes, or are written as such. A code that is an old one to the last bit keeps its row, so that
    dropping codes loses nothing.

    Args:
        old: (found.size, dim), the file's effective codes, where they cannot be computed from its rows.

    Raises:
        CodebookError: New codes pass through what has no inverse.
    """
    how = effective(found, checkpoint.shapes)
    if how.kind not in ("steps", "opaque"):
        return None
    before = stored_rows(checkpoint.tensor(found.key), found)
    codes_before = effective_rows(checkpoint, found) if old is None else old
    places = {code.tobytes(): i for i, code in enumerate(codes_before.cpu().numpy())}
    at = torch.tensor([places.get(code.tobytes(), -1) for code in codes.cpu().numpy()])
    rows = before[at.clamp(min=0)]
    new = at < 0
    if bool(new.any()):
        if how.kind == "opaque":
            raise CodebookError(
                f"{int(new.sum())} new codes of {found.key} cannot be written: the model's quantize makes codes of its "
                "rows in a way that cannot be inverted; prune, or keep the most used with prune --keep"
            )
        inverse = codes[new].cpu().double()
        for kind, key in reversed(list(zip(how.with_tensors, how.beside, strict=True))):
            inverse = _backward(kind, inverse, checkpoint.tensor(key), key)
        rows = rows.clone()
        rows[new] = functional.normalize(inverse, dim=1).float() if how.unit_first else inverse.float()
    return rounded(checkpoint, found, rows)


def owned_keys(checkpoint: Checkpoint, found: FoundCodebook) -> set[str]:
    """The file's keys that belong to a codebook and follow it, under all of its names."""
    how = effective(found, checkpoint.shapes)
    beside = set(how.beside) if how.kind in ("ratio", "projected", "network") else set[str]()
    for place in found.places:
        beside |= {*flags(place.key, checkpoint.entries), *recent(place.key, checkpoint.entries)}
        beside |= {place.key, *place.companions}
    return beside


def added_bytes(checkpoint: Checkpoint, found: FoundCodebook, size: int) -> int:
    """By how much the file grows with `size` codes and what follows them; negative where it shrinks."""
    nbytes = 0
    for place in found.places:
        entry = checkpoint.entries[place.key]
        nbytes += entry.nbytes // entry.shape[place.axis]
        nbytes += sum(checkpoint.entries[key].nbytes // place.size for key in place.companions)
    return (size - found.size) * nbytes


def rounded(checkpoint: Checkpoint, found: FoundCodebook, rows: Tensor) -> Tensor:
    """rows (size, dim) float32 as the stored dtype has them. Raises CodebookError where it cannot hold them."""
    dtype = torch_dtype(checkpoint.entries[found.key].dtype)
    held_rows = rows.to(dtype).float()
    if not bool(torch.isfinite(held_rows).all()):
        raise CodebookError(f"the new codes of {found.key} do not fit {dtype}: some are not finite in it")
    return held_rows


def followers(checkpoint: Checkpoint, found: FoundCodebook) -> tuple[Companion, ...]:
    """What each tensor beside a codebook is. Raises CodebookError, naming it, where nothing says so."""
    stored = {key: checkpoint.tensor(key) for key in _beside(checkpoint, found)}
    how = effective(found, checkpoint.shapes)
    rows = exact_rows(checkpoint.tensor(found.key), found)
    if how.kind == "ratio":  # the rows are the sums; the codes are what they are over the counts
        rows = effective_rows(checkpoint, replace(found, also=()))
    return companions_of(found, rows, stored, checkpoint.declared)


def _beside(checkpoint: Checkpoint, found: FoundCodebook) -> list[str]:
    keys = {*found.companions, *flags(found.key, checkpoint.entries), *recent(found.key, checkpoint.entries)}
    return sorted(keys)


def changed_codebook(
    checkpoint: Checkpoint,
    found: FoundCodebook,
    codes: Tensor,
    counts: Tensor,
    index_map: Tensor,
    rows: Tensor | None = None,
) -> dict[str, Tensor]:
    """The codebook's tensor and what follows it, by file key, under all of its names.

    Args:
        codes: (size, dim) float32, the new effective codes, rounded.
        counts: (size,), how often each is used.
        index_map: (found.size,) int64, the new row that each old code lives on in, negative for none.
        rows: (size, stored dim), of which the model makes the codes, as `rows_of_codes` gives them.

    Raises:
        CodebookError: The file's layout has no room for such codes, or a companion is not understood.
    """
    changed = dict[str, Tensor]()
    for place in found.places:
        changed |= _changed_place(checkpoint, replace(place, form=found.form), codes, counts, index_map, rows)
    return changed


def _changed_place(
    checkpoint: Checkpoint, found: FoundCodebook, codes: Tensor, counts: Tensor, index_map: Tensor, rows: Tensor | None
) -> dict[str, Tensor]:
    how, old = effective(found, checkpoint.shapes), checkpoint.tensor(found.key)
    stored = {key: checkpoint.tensor(key) for key in (*_beside(checkpoint, found), *how.beside)}
    # A code without hits counts one: with none, its running sum is 0, and the model's own EMA moves it there.
    hits = counts.clamp(min=1)
    beside = dict[str, Tensor]()
    if how.kind == "ratio":
        # Powers of two: code * count / count is then the code, to the last bit.
        hits = held(codes, hits.double().log2().round().exp2(), [old.dtype]).log2().floor().exp2()
        tensor = codes * hits[:, None]
    elif how.kind == "projected":
        tensor, beside = _behind_identity(found, codes, [stored[key] for key in how.beside], how.beside)
    elif rows is not None:
        tensor = rows
    else:
        tensor = _unchanged(codes, exact_rows(old, found), index_map) if old.dtype == torch.float64 else codes
    padding = old.movedim(found.axis, 0)[found.size :].flatten(1).to(tensor.dtype)
    tensor = laid_out(torch.cat([tensor, padding]), old, found.axis)
    followed = codes if how.kind == "ratio" else stored_rows(tensor, replace(found, size=len(codes)))
    values = companion_values(found, followers(checkpoint, found), stored, followed, hits)
    return {found.key: tensor} | values | beside


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
