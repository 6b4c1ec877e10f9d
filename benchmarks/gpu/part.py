"""What the parts of a GPU run share: options, a device that waits, and a result that is written when the part ends."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import machine


def options(about: str) -> argparse.Namespace:
    """--device, --quick, --out FILE.json and --shared FOLDER, as `gpu.sh` gives them to every part."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="sizes that a CPU does in seconds")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shared", type=Path, help="the folder with CIFAR-10; left out: the bundled demo and sample")
    return parser.parse_args()


def wait(device: str) -> None:
    """Until the device has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(device: str, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and what it returned."""
    wait(device)
    since = time.perf_counter()
    result = work()
    wait(device)
    return time.perf_counter() - since, result


def in_turn(device: str, ways: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of each way, all in turn, after one call of each for whatever is done once."""
    for way in ways.values():
        way()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, way in ways.items():
            found[name].append(timed(device, way)[0])
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def peak(device: str) -> int | None:
    """Bytes of device memory at most since `forget_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else None


def forget_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def write(given: argparse.Namespace, found: dict[str, Any]) -> None:
    """The result so far, whole: a part that is stopped leaves what it had."""
    about = {"part": Path(sys.argv[0]).stem, "device": given.device, "quick": given.quick}
    about["machine"] = machine("cuda" if given.device.startswith("cuda") else "cpu")
    partial = given.out.with_suffix(".partial")
    partial.write_text(json.dumps(about | found, indent=2) + "\n")
    partial.replace(given.out)
