"""What lies beside a codebook in the file and must follow it: EMA state, flags, shadows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from codebook_tools.checkpoints.detect import FoundCodebook


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
    Role("sums", re.compile(r"emb\w*_?(?:avg|sum|ema$)|ema_?(?:w$|embed)|k_sum|m_i_ts"), lambda c, n: c * n[:, None]),
    Role("counts", re.compile(r"cluster|usage|count|_size|k_elem|n_i_ts", re.IGNORECASE), lambda c, n: n),
    Role("shares", re.compile(r"prob"), lambda c, n: n / n.sum().clamp(min=1)),
    Role("shadow", re.compile(r"embed|weight|codebook"), lambda c, n: c),
    Role("statistics", re.compile(r""), lambda c, n: torch.zeros_like(n)),
)  # fmt: skip
FLAG = re.compile(r"(?:^|\.|_)(?:is_)?(?:init(?:t?ed|iali[sz]ed)?|data_initiali[sz]ed)$")
RECENT = re.compile(r"(?:^|\.)codebook_used$")
"""LlamaGen keeps indices of recent tokens there, not rows: they are of the old codes, however many there are."""


def laid_out(rows: Tensor, like: Tensor, axis: int) -> Tensor:
    """rows (size, dim), or one number each, (size,), laid out and rounded as `like` is stored, with another size."""
    others = [length for i, length in enumerate(like.shape) if i != axis]
    return rows.reshape(len(rows), *others).movedim(0, axis).to(like.dtype).contiguous()


def companion_values(
    found: FoundCodebook, stored: Mapping[str, Tensor], codes: Tensor, counts: Tensor
) -> dict[str, Tensor]:
    """New values of every companion and flag of a codebook, by key, in their stored dtypes.

    stored: the old tensors by key. codes: (new size, dim) float32, as stored. counts: (new size,) int64 or float; a
    float16 companion cannot hold those of a large data set, so they shrink together until it can.
    """
    weights = held(codes, counts, [stored[key].dtype for key in found.companions])
    values = {}
    for key in found.companions:
        if RECENT.search(key):
            continue
        old = stored[key]
        role = next(role for role in ROLES if role.leaf.search(key.rpartition(".")[2]))
        value = role.value(codes, weights)
        axes = [axis for axis, length in enumerate(old.shape) if length == found.size]
        axis = found.axis if found.axis in axes else axes[0]
        if value.ndim == 1 and old.numel() != found.size:  # per code, but repeated along other axes
            value = value.reshape([-1 if i == axis else 1 for i in range(old.ndim)])
            values[key] = value.expand([len(codes) if i == axis else n for i, n in enumerate(old.shape)]).to(old.dtype)
        elif value.ndim == 2 and old.numel() == found.size * value.shape[1] and old.ndim >= 2:
            values[key] = laid_out(value, old, found.axis if old.shape[found.axis] == found.size else axis)
        else:
            value = value if value.ndim == 1 else torch.zeros_like(weights)
            values[key] = laid_out(value, old, axis)
    for key in flags(found.key, stored):
        values[key] = torch.ones_like(stored[key])
    for key in recent(found.key, stored):
        values[key] = torch.zeros_like(stored[key])
    return {key: value.contiguous() for key, value in values.items()}


def held(codes: Tensor, counts: Tensor, dtypes: Iterable[torch.dtype]) -> Tensor:
    """(size,) float32: the counts, or a share of them small enough for sums of so many codes to be held."""
    ceiling = min((torch.finfo(dtype).max for dtype in dtypes if dtype.is_floating_point), default=math.inf)
    weights = counts.float()
    most = float((weights * codes.abs().amax(1).clamp(min=1)).max())
    return weights * (ceiling / 2 / most) if most > ceiling else weights


def flags(codebook_key: str, keys: Iterable[str]) -> list[str]:
    """Keys beside the codebook that say whether it was initialised: they must say yes, or the library starts anew."""
    return _beside(codebook_key, keys, FLAG)


def recent(codebook_key: str, keys: Iterable[str]) -> list[str]:
    """Keys beside the codebook that hold tokens of the past: they must be forgotten."""
    return _beside(codebook_key, keys, RECENT)


def _beside(codebook_key: str, keys: Iterable[str], pattern: re.Pattern[str]) -> list[str]:
    """Those of the module that holds the codebook, or of the one around it: quantize.embedding.weight, quantize.x."""
    module = codebook_key.removesuffix(".weight").rpartition(".")[0]
    scopes = {codebook_key.rpartition(".")[0], module}
    return [key for key in keys if key.rpartition(".")[0] in scopes and pattern.search(key)]
