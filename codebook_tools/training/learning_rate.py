"""Learning rates by network width and depth, by tensor size and by step; and the evaluation steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import geometric_mean

from torch import Tensor

_STEPS_TO_TWICE = 4  # that relative rates are rounded to, so that an optimizer has few groups
_NOTHING = 1e-9  # a kernel that starts at 0 says nothing of the others
_MOVED = 1.25  # how far Adam moves all kernels together in a step, in units of their initial size
_BATCH = 64  # images to a batch where _MOVED was tuned
_HIGHEST = 5e-3  # that was good anywhere: networks of a few small kernels would have ten times that
_WITHOUT_KERNELS = 1e-3
_LARGEST_RMS, _RMS_OF_ONE_STEP, _RMS_DECAY = 0.3, 3.0, 0.4  # 0.25 for 500 steps, 0.14 for 2,000, 0.05 for 25,000
_CODES_MOVED = 0.01  # how far Adam moves codes that train alone in a step, in deviations of their latents
_FRESH = 0.1  # relative rate of what starts at 0, or near it as biases do: it would stay there


def usual_rate(parameters: Sequence[Tensor], images: int) -> float:
    """Adam's learning rate for tensors of usual size, by the shapes of the kernels (out, in, ...), not their values.

    A fraction of the 1 / sqrt(3 inputs) that PyTorch initializes entries with, which is smaller in wider networks; over
    the number of kernels, whose changes add up; times the root of the batch size, which makes Adam's steps less noisy
    (Malladi et al. 2022, arXiv 2205.10287).

    Args:
        parameters: What trains.
        images: Items to a step.

    Returns:
        The rate after warm-up.
    """
    kernels = [tensor for tensor in parameters if tensor.ndim > 1]
    if not kernels:
        return _WITHOUT_KERNELS
    initial = geometric_mean(1 / math.sqrt(3 * kernel[0].numel()) for kernel in kernels)
    return min(_HIGHEST, _MOVED * initial / len(kernels) * math.sqrt(images / _BATCH))


def rate_of_codes(variances: Sequence[float], images: int) -> float:
    """Adam's learning rate for codes that train alone, in units of their latents.

    Args:
        variances: Of the latents of each codebook.
        images: Items to a step.

    Returns:
        The rate after warm-up.
    """
    return _CODES_MOVED * geometric_mean(map(math.sqrt, variances)) * math.sqrt(images / _BATCH)


def relative_rates(parameters: Sequence[Tensor]) -> list[float]:
    """The factor on the learning rate of each tensor: its root mean square over the geometric mean of all kernels'.

    Adam moves every entry by about its learning rate, whatever the gradient: by 10 % where weights are small, and by
    0.1 % where they are large. With these factors each tensor moves by the same fraction of itself, as in LAMB (You et
    al. 2020, arXiv 1904.00962), but by its size at the start; and a layer that is scaled while the next one compensates
    learns as before. Biases and gains get 0.1 to 1.
    """
    sizes = [float(tensor.detach().float().square().mean().sqrt()) for tensor in parameters]
    kernels = [size for size, tensor in zip(sizes, parameters, strict=True) if tensor.ndim > 1 and size > _NOTHING]
    usual = geometric_mean(kernels) if kernels else 1.0
    factors = []
    for size, tensor in zip(sizes, parameters, strict=True):
        factor = size / usual if size > _NOTHING else _FRESH
        if tensor.ndim <= 1:
            factor = min(max(factor, _FRESH), 1.0)
        factors.append(2.0 ** (round(math.log2(factor) * _STEPS_TO_TWICE) / _STEPS_TO_TWICE))
    return factors


def muon_rms(steps: int) -> float:
    """The root mean square of Muon's updates of so many steps, in units of the learning rate.

    A longer run goes as far by smaller updates, whose noise the end of the run need not average out.
    """
    return min(_LARGEST_RMS, _RMS_OF_ONE_STEP * math.pow(steps, -_RMS_DECAY))


WARM_UP = 100  # steps


def schedule(step: int, steps: int) -> float:
    """Fraction of the learning rate at a step, from 0, of so many: linear warm-up, then linear decay to 0."""
    warm_up = min(WARM_UP, max(1, steps // 2))
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def evaluation_steps(steps: int) -> set[int]:
    """Steps at which a run is evaluated: 1, 10 and 100, which show a bad installation early, and each tenth of it."""
    return {step for step in (1, 10, 100) if step <= steps} | set(range(0, steps + 1, max(1, steps // 10))) | {steps}
