"""Where networks and k-means run, by name, and what a device may lack."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from codebook_tools.errors import CodebookError
from codebook_tools.runtime import distributed

_AUTO = ("cuda", "xpu", "mps")
"""Kinds of accelerators that "auto" looks for, in this order."""

RUN_AHEAD = ("cuda", "xpu")
"""Kinds that copy from pinned memory by themselves while the host goes on: batches are decoded ahead for them. mps
shares the memory of the host."""


def device_of(name: str) -> torch.device:
    """Where networks and k-means run.

    Args:
        name: "auto", or a device as torch names it: "cpu", "cuda", "cuda:1", "xpu", "mps", or of a kind that another
            distribution adds to torch.

    Returns:
        The device; for "auto" the first accelerator there is, or the CPU. Of several processes each has a GPU of its
        own.

    Raises:
        CodebookError: torch finds no such device, or several processes cannot share it.
    """
    together = distributed.count() > 1
    if name == "auto":
        name = next((kind for kind in (("cuda",) if together else _AUTO) if _there_are(kind)), "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:  # of a kind that it does not know, or no name at all
        device = None
    if device is None or (device.index or 0) >= _there_are(device.type):
        raise CodebookError(f"--device {name}: this torch finds no such device; use --device cpu or auto")
    if together and device.type != "cpu":
        if device != torch.device("cuda"):
            raise CodebookError(
                f"--device {name}: of several processes each takes a CUDA device of its own; use --device cuda or cpu"
            )
        return torch.device("cuda", torch.cuda.current_device())
    if device.index:
        torch.get_device_module(device).set_device(device)  # kernels in Triton go to the current one
    return device


def _there_are(kind: str) -> int:
    """How many devices of a kind torch finds."""
    module = getattr(torch, kind, None)
    if module is None or not hasattr(module, "device_count"):
        return 0
    available = getattr(module, "is_available", lambda: True)  # older versions of torch.mps have none
    return int(module.device_count()) if available() else 0


def sent(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device, to which they are copied while the host goes on. Not so on mps, which would read them
    after they were released: https://github.com/pytorch/pytorch/issues/139550."""
    return values.to(device, non_blocking=device.type != "mps")


def wide(values: Tensor) -> Tensor:
    """The values in float64: where they are, or on the CPU where their device has no float64, as mps."""
    return (values if has_float64(values.device) else values.cpu()).double()


def wide_device(device: torch.device) -> torch.device:
    """Where `wide` puts values of that device."""
    return device if has_float64(device) else torch.device("cpu")


@cache
def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64: mps and some GPUs of xpu do not."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True
