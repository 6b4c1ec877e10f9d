"""How fast each tensor learns: in proportion to its own size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import geometric_mean

from torch import Tensor

_STEPS_TO_TWICE = 4  # that shares are rounded to, so that an optimiser has few groups
_NOTHING = 1e-9  # a kernel that starts at 0 says nothing of the others
_FRESH = 0.1  # the share of what starts at 0, or near it as biases do: it would stay there


def shares(parameters: Sequence[Tensor]) -> list[float]:
    """By what the learning rate of each is to be multiplied: its root mean square over the geometric mean of those of
    all matrices and kernels; for biases and gains 1 at most, and 0.1 at least.

    Adam moves every entry by about its learning rate, whatever the gradient: a share of 10 % where weights are small,
    and of 0.1 % where they are large. With these each tensor moves by the same share of itself, as with LAMB (You et
    al. 2020, arXiv 1904.00962), but by its size at the start; and a layer that is scaled while the next one makes up
    for it learns as before.
    """
    sizes = [float(tensor.detach().float().square().mean().sqrt()) for tensor in parameters]
    kernels = [size for size, tensor in zip(sizes, parameters, strict=True) if tensor.ndim > 1 and size > _NOTHING]
    usual = geometric_mean(kernels) if kernels else 1.0
    found = []
    for size, tensor in zip(sizes, parameters, strict=True):
        share = size / usual if size > _NOTHING else _FRESH
        if tensor.ndim <= 1:
            share = min(max(share, _FRESH), 1.0)
        found.append(2.0 ** (round(math.log2(share) * _STEPS_TO_TWICE) / _STEPS_TO_TWICE))
    return found
