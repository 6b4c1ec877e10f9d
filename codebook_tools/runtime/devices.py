"""Devices by name, and float64 for those without it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from codebook_tools.errors import CodebookError
from codebook_tools.runtime import distributed

_AUTO = ("cuda", "xpu", "mps")
"""Device types that "auto" looks for, in this order."""

RUN_AHEAD = ("cuda", "xpu")
"""Device types that copy from pinned memory while the host goes on, so that batches are decoded ahead for them. mps
shares the host's memory."""


def device_of(name: str) -> torch.device:
    """Find the device that networks and k-means run on.

    Args:
        name: "auto", or a device as torch names it: "cpu", "cuda", "cuda:1", "xpu", "mps", or one of a type that
            another distribution adds to torch.

    Returns:
        The device; for "auto" the first accelerator there is, or the CPU. Each of several processes has its own GPU.

    Raises:
        CodebookError: torch finds no such device, or several processes cannot share it.
    """
    several = distributed.count() > 1
    if name == "auto":
        name = next((kind for kind in (("cuda",) if several else _AUTO) if _number_of(kind)), "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:  # an unknown type, or no name of a device
        device = None
    if device is None or (device.index or 0) >= _number_of(device.type):
        raise CodebookError(f"--device {name}: this torch finds no such device; use --device cpu or auto")
    if several and device.type != "cpu":
        if device != torch.device("cuda"):
            raise CodebookError(
                f"--device {name}: of several processes each takes a CUDA device of its own; use --device cuda or cpu"
            )
        return torch.device("cuda", torch.cuda.current_device())
    if device.index:
        torch.get_device_module(device).set_device(device)  # Triton starts kernels on the current device
    return device


def _number_of(kind: str) -> int:
    """Number of devices of a type that torch finds."""
    module = getattr(torch, kind, None)
    if module is None or not hasattr(module, "device_count"):
        return 0
    available = getattr(module, "is_available", lambda: True)  # older versions of torch.mps have none
    return int(module.device_count()) if available() else 0


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Copy the values to the device, without waiting for the copy.

    On mps it does wait: mps would read them after they were released,
    https://github.com/pytorch/pytorch/issues/139550.
    """
    return values.to(device, non_blocking=device.type != "mps")


def wide(values: Tensor) -> Tensor:
    """The values in float64, on their device or, where that has no float64, on the CPU."""
    return (values if has_float64(values.device) else values.cpu()).double()


def wide_device(device: torch.device) -> torch.device:
    """The device on which `wide` returns values of `device`."""
    return device if has_float64(device) else torch.device("cpu")


@cache
def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64; mps and some xpu GPUs do not."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True
