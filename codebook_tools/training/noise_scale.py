"""How far the gradients of different batches point the same way: far for a collapsed model, little for a good one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_NOISY = 0.4  # noise to signal that lowers no rate: collapsed models had up to 0.4, and good ones 0.9 to 2.7
_STEPS_TO_TWICE = 4  # that the factor is rounded to: it must not depend on the last bits of gradients
_LEAST = 1 / 8


def gradient_agreement(gradients: Iterable[Sequence[Tensor]]) -> float:
    """The part of the squared length of a batch's gradient that is the mean gradient's: 1 / (1 + noise to signal).

    The estimate of McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1, for each tensor by itself, so that it does
    not depend on their scales.

    Args:
        gradients: Of two batches or more, for each the gradients of the same tensors, one at least.

    Returns:
        The mean over tensors, of 0 to 1: 1 where all batches agree, or no tensor has a gradient.
    """
    sums, squares = list[Tensor](), list[Tensor]()
    for of_batch in gradients:
        own = [gradient.detach().float() for gradient in of_batch]
        sums = [a + b for a, b in zip(sums, own, strict=True)] if sums else [gradient.clone() for gradient in own]
        squares.append(_squares(own))
    # |sum|^2 is the squares of all batches, and the products of all pairs, whose mean is the mean gradient's square.
    square, batches = torch.stack(squares).sum(0), len(squares)
    shares = ((_squares(sums) - square) / (square * (batches - 1))).clamp(0, 1)
    total, tensors = torch.stack([shares.where(square > 0, 0).sum(), (square > 0).sum()]).tolist()
    return total / tensors if tensors else 1.0


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.square().sum() for tensor in tensors])


def rate_factor(agreement: float) -> float:
    """The factor on the learning rate for gradients of such agreement: 1, or in inverse proportion to their noise.

    The best rate of McCandlish et al. 2018, section 2.2, where noise outweighs the signal.
    """
    noise = (1 - agreement) / max(agreement, 1e-9)
    factor = min(1.0, max(_LEAST, _NOISY / max(noise, 1e-9)))
    return math.pow(2.0, round(math.log2(factor) * _STEPS_TO_TWICE) / _STEPS_TO_TWICE)
