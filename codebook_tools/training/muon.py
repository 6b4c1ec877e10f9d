"""Muon, an optimizer of kernels.

Muon (Jordan et al. 2024) moves a kernel by the orthogonal matrix nearest to its momentum: all directions by the same
length, where Adam follows the few in which gradients are large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95

# Of a step of Newton's iteration that drives singular values of (0, 1] towards 1, fast rather than precisely: those of
# the reference implementation, github.com/KellerJordan/Muon.
_LINEAR, _CUBIC, _QUINTIC = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Stochastic gradient descent with Nesterov momentum whose updates are made orthogonal.

    Kernels (out, in, ...) count as matrices (out, in * ...). Parameter groups are as torch.optim.Adam's.

    Attributes:
        update_rms: Root mean square of the entries of an update, in units of the learning rate.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], update_rms: float) -> None:
        """Begin without momentum. groups: of parameters of two dimensions and more."""
        super().__init__(groups, {"lr": 1e-3})
        self.update_rms = update_rms

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move all parameters that have gradients. closure: not used."""
        for group in self.param_groups:
            for kernel in group["params"]:
                if kernel.grad is None:
                    continue
                gradient = kernel.grad.float()
                state = self.state[kernel]
                if not state:
                    state["momentum"] = torch.zeros_like(gradient)
                momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
                matrix = gradient.lerp(momentum, MOMENTUM).flatten(1)
                length = group["lr"] * self.update_rms * max(matrix.shape) ** 0.5
                kernel.sub_(nearly_orthogonal(matrix).view_as(kernel) * length)


def nearly_orthogonal(matrix: Tensor) -> Tensor:
    """Replace the singular values of a matrix by values of about 0.7 to 1.2, and keep its singular vectors.

    The Newton-Schulz iteration of the reference implementation, on the smaller Gram matrix, whose products are much
    cheaper than those of a wide kernel.

    Args:
        matrix: (rows, columns) float32.

    Returns:
        (rows, columns); 0 where the matrix is.
    """
    if len(matrix) > matrix.shape[1]:
        return nearly_orthogonal(matrix.T).T
    matrix = matrix / matrix.norm().clamp(min=1e-20)
    gram = matrix @ matrix.T
    scale = gram.norm().clamp(min=1e-20)  # of the singular values' fourth powers: no singular value is above its root
    gram = gram / scale
    factor: Tensor | None = None
    for _ in range(_ITERATIONS):
        step = _CUBIC * gram + _QUINTIC * (gram @ gram)
        step.diagonal().add_(_LINEAR)
        factor = step if factor is None else step @ factor
        gram = step @ gram @ step
    assert factor is not None
    orthogonal: Tensor = factor @ matrix / scale.sqrt()
    return orthogonal
