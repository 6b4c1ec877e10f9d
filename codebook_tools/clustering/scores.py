"""Scores of codes in float32: products, their rounding, and the two lowest of each latent."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Otherwise torch multiplies by MKL, which takes up to twice as long on CPUs that are not Intel's.
_ONEDNN: bool = torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
    torch.ops.mkldnn, "_linear_pointwise"
)

EPS = torch.finfo(torch.float32).eps

_ROUNDING = {
    **dict.fromkeys(("highest", "ieee", "none"), EPS),
    **dict.fromkeys(("high", "tf32"), 2.0**-10),
    **dict.fromkeys(("medium", "bf16"), 2.0**-7),
}
"""Relative rounding error of a product's terms, by torch.set_float32_matmul_precision or a backend's fp32_precision."""


def lowest(scores: Tensor) -> Tensor:
    """(..., size) -> (...) int64, the code of the lowest score of each row; the first among equals."""
    if not scores.is_cpu:
        return scores.argmin(-1)
    return torch.from_numpy(scores.numpy().argmin(-1))  # numpy compares many at a time, torch one by one


def two_lowest(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The lowest scores of each row (n, size), which are overwritten.

    Returns:
        (n,) int64, the code of the lowest score; (n,) float32, that score; and the second, infinite for one code.
    """
    if not scores.is_cpu:
        index = scores.argmin(1, keepdim=True)
        best = scores.gather(1, index)
        return index[:, 0], best[:, 0], scores.scatter_(1, index, torch.inf).amin(1)
    numbers, row = scores.numpy(), np.arange(len(scores))
    code = numbers.argmin(1)
    least = numbers[row, code]
    numbers[row, code] = np.inf
    return torch.from_numpy(code), torch.from_numpy(least), scores.amin(1)


def not_above(scores: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of each score (n, size) that is not above limit (n,), or no finite number: (pairs,) int64 each."""
    if not scores.is_cpu:
        row, column = (~(scores > limit[:, None]) | ~scores.isfinite()).nonzero(as_tuple=True)
        return row, column
    numbers = scores.numpy()
    at = np.flatnonzero(~(numbers > limit.numpy()[:, None]) | ~np.isfinite(numbers))
    of_row, of_code = np.divmod(at, numbers.shape[1])
    return torch.from_numpy(of_row), torch.from_numpy(of_code)


def product(latents: Tensor, weights: Tensor, norms: Tensor) -> Tensor:
    """norms (size,) + latents (n, dim) @ weights (size, dim).T."""
    if not (_ONEDNN and latents.is_cpu):
        return torch.addmm(norms, latents, weights.T)
    scores: Tensor = torch.ops.mkldnn._linear_pointwise(latents.contiguous(), weights, norms, "none", [], "")
    return scores


def rounding() -> float:
    """Rounding of a product's terms at torch's present settings.

    There are two settings, and torch raises where the first is read after the second was written: then the coarsest of
    the backends counts.
    """
    try:
        precisions = [torch.get_float32_matmul_precision()]
    except RuntimeError:
        precisions = [backend.matmul.fp32_precision for backend in (torch.backends.cuda, torch.backends.mkldnn)]
    return max(_ROUNDING[precision] for precision in precisions)
