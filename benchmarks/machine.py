"""What a benchmark ran on: hardware and versions, for its results."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch


def machine(device: str = "cpu") -> dict[str, object]:
    """Platform, processor and versions; device: "cpu" or "cuda", whose name goes along."""
    found: dict[str, object] = {
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", "scikit-learn")},
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def _cpu() -> str:
    """The model, as Linux names it."""
    told = Path("/proc/cpuinfo")
    names = [line.partition(":")[2] for line in told.read_text().splitlines() if "model name" in line]
    return names[0].strip() if names else platform.processor() or platform.machine()
