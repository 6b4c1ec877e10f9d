"""What lies beside a codebook in the file and must follow it: EMA state, flags, shadows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.reading import Checkpoint, torch_dtype
from codebook_tools.errors import CodebookError


@dataclass(frozen=True)
class Role:
    """What the tensors of a name mean, and what they are for new codes and their counts.

    value: codes (size, dim) float32 as stored, counts (size,) float32 -> a tensor of the new values, codes first.
    """

    name: str
    leaf: re.Pattern[str]
    value: Callable[[Tensor, Tensor], Tensor]


# The first row whose pattern is found in the last part of the key counts. A stale row of any kind wipes a codebook out
# in one training step of the model's own code, or has k-means overwrite it at the first forward pass.
ROLES = (
    Role("sums", re.compile(r"emb\w*_?(?:avg|sum)|ema_?(?:w$|embed)|k_sum|m_i_ts"), lambda c, n: c * n[:, None]),
    Role("counts", re.compile(r"cluster|usage|count|_size|k_elem|n_i_ts", re.IGNORECASE), lambda c, n: n),
    Role("shares", re.compile(r"prob"), lambda c, n: n / n.sum().clamp(min=1)),
    Role("shadow", re.compile(r"embed|weight|codebook"), lambda c, n: c),
    Role("statistics", re.compile(r""), lambda c, n: torch.zeros_like(n)),
)  # fmt: skip
FLAG = re.compile(r"(?:^|\.|_)(?:is_)?(?:init(?:t?ed|iali[sz]ed)?|data_initiali[sz]ed)$")


def rows_of(stored: Tensor, found: FoundCodebook) -> Tensor:
    """(size, dim) float32 from the stored tensor, whichever way its axes lie."""
    return stored.movedim(found.axis, 0).reshape(found.size, -1).float()


def stored_as(rows: Tensor, like: Tensor, axis: int) -> Tensor:
    """The inverse of `rows_of`: rows (size, dim), laid out and rounded as `like` is stored, with another size."""
    others = [length for i, length in enumerate(like.shape) if i != axis]
    return rows.reshape(len(rows), *others).movedim(0, axis).to(like.dtype).contiguous()


def companion_values(
    found: FoundCodebook, stored: Mapping[str, Tensor], codes: Tensor, counts: Tensor
) -> dict[str, Tensor]:
    """New values of every companion and flag of a codebook, by key, in their stored dtypes.

    stored: the old tensors by key. codes: (new size, dim) float32, as stored. counts: (new size,) int64 or float; a
    float16 companion cannot hold those of a large data set, so they shrink together until it can.
    """
    weights = counts.float()
    floats = [stored[key].dtype for key in found.companions if stored[key].is_floating_point()]
    ceiling = min((torch.finfo(dtype).max for dtype in floats), default=math.inf)
    most = float((weights * codes.abs().amax(1).clamp(min=1)).max())
    if most > ceiling:
        weights = weights * (ceiling / 2 / most)
    values = {}
    for key in found.companions:
        old = stored[key]
        role = next(role for role in ROLES if role.leaf.search(key.rpartition(".")[2]))
        value = role.value(codes, weights)
        axes = [axis for axis, length in enumerate(old.shape) if length == found.size]
        axis = found.axis if found.axis in axes else axes[0]
        if value.ndim == 1 and old.numel() != found.size:  # per code, but repeated along other axes
            value = value.reshape([-1 if i == axis else 1 for i in range(old.ndim)])
            values[key] = value.expand([len(codes) if i == axis else n for i, n in enumerate(old.shape)]).to(old.dtype)
        elif value.ndim == 2 and old.numel() == found.size * value.shape[1] and old.ndim >= 2:
            values[key] = stored_as(value, old, found.axis if old.shape[found.axis] == found.size else axis)
        else:
            value = value if value.ndim == 1 else torch.zeros_like(weights)
            values[key] = stored_as(value, old, axis)
    for key in flags(found.key, stored):
        values[key] = torch.ones_like(stored[key])
    return {key: value.contiguous() for key, value in values.items()}


def rounded(checkpoint: Checkpoint, found: FoundCodebook, rows: Tensor) -> Tensor:
    """rows (size, dim) float32 as the stored dtype has them. Raises CodebookError where it cannot hold them."""
    dtype = torch_dtype(checkpoint.entries[found.key].dtype)
    held = rows.to(dtype).float()
    if not bool(torch.isfinite(held).all()):
        raise CodebookError(f"the new codes of {found.key} do not fit {dtype}: some are not finite in it")
    return held


def effective_rows(checkpoint: Checkpoint, found: FoundCodebook) -> Tensor:
    """(size, dim) float32: the codes of a file, as the decoder sees them. Raises CodebookError where some are not
    finite."""
    rows = rows_of(checkpoint.tensor(found.key), found)
    if not bool(torch.isfinite(rows).all()):
        raise CodebookError(f"{found.key} in {checkpoint.path} is not finite")
    return rows


def owned_keys(found: FoundCodebook, keys: Iterable[str]) -> set[str]:
    """Of the keys of a file, those that belong to a codebook and follow it."""
    return {found.key, *found.companions, *flags(found.key, keys)}


def added_bytes(checkpoint: Checkpoint, found: FoundCodebook, size: int) -> int:
    """By how much the file grows with `size` codes and what follows them; negative where it shrinks."""
    old = checkpoint.entries[found.key].shape[found.axis]
    follow = [checkpoint.entries[key] for key in (found.key, *found.companions)]
    return (size - old) * (sum(entry.nbytes for entry in follow) // old)


def changed_codebook(checkpoint: Checkpoint, found: FoundCodebook, rows: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """The codebook's tensor and what follows it, by file key, for new rows (size, dim) and their counts (size,).

    found: of the file, or of the running model: its size does not count.
    """
    stored = {key: checkpoint.tensor(key) for key in owned_keys(found, checkpoint.entries)}
    old = replace(found, size=stored[found.key].shape[found.axis])
    tensor = stored_as(rows, stored[found.key], found.axis)
    written = rows_of(tensor, replace(found, size=len(rows)))
    # A code without hits counts one: with none, its running sum is 0, and the model's own EMA moves it there.
    return {found.key: tensor} | companion_values(old, stored, written, counts.clamp(min=1))


def flags(codebook_key: str, keys: Iterable[str]) -> list[str]:
    """Keys beside the codebook that say whether it was initialised: they must say yes, or the library starts anew."""
    scope = codebook_key.rpartition(".")[0]
    return [key for key in keys if key.rpartition(".")[0] == scope and FLAG.search(key)]
