"""How high the learning rate is: by a network's width and depth, by each tensor's size, and by the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import geometric_mean

from torch import Tensor

_STEPS_TO_TWICE = 4  # that shares are rounded to, so that an optimiser has few groups
_NOTHING = 1e-9  # a kernel that starts at 0 says nothing of the others
_MOVED = 1.25  # how far Adam moves all kernels together in a step, in sizes at which they begin
_BATCH = 64  # images in the batches that this was found with
_HIGHEST = 5e-3  # that was found good anywhere: networks of a few small kernels would have ten times that
_WITHOUT_KERNELS = 1e-3
_FRESH = 0.1  # the share of what starts at 0, or near it as biases do: it would stay there


def usual_rate(parameters: Sequence[Tensor], images: int) -> float:
    """Adam's learning rate for tensors of usual size, where batches have so many images.

    By the kernels (out, in, ...) there are, not by what is in them: a share of the 1 / sqrt(3 inputs) that PyTorch
    draws entries of them with, the smaller, the wider a network is; over how many there are, for what they change adds
    up; times the root of the images, by which Adam's steps are less of a chance (Malladi et al. 2022, arXiv
    2205.10287).
    """
    kernels = [tensor for tensor in parameters if tensor.ndim > 1]
    if not kernels:
        return _WITHOUT_KERNELS
    begun = geometric_mean(1 / math.sqrt(3 * kernel[0].numel()) for kernel in kernels)
    return min(_HIGHEST, _MOVED * begun / len(kernels) * math.sqrt(images / _BATCH))


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


WARM_UP, FLOOR = 100, 0.05  # steps of linear warm-up; share of the learning rate that cosine decay ends at


def rate(step: int, steps: int) -> float:
    """Share of the learning rate after so many steps: linear warm-up, then cosine decay to FLOOR."""
    warm_up = min(WARM_UP, max(1, steps // 2))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def looks_at(steps: int) -> set[int]:
    """Early steps tell a bad installation from a later collapse; then ten looks over the run."""
    return {step for step in (1, 10, 100) if step <= steps} | set(range(0, steps + 1, max(1, steps // 10))) | {steps}
