"""k-means on the device: seconds and inertia, ours at several tolerances, and flash-kmeans where it is installed.

    python benchmarks/gpu/clustering.py --out FILE.json [--device cuda] [--quick]

A million points of 64 dimensions in 512 clusters, and of 8 dimensions in 16,384, around 3,000 centres. The first run of
ours that reaches the inertia of a peer says how its time compares.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from part import forget_peak, options, peak, timed, write
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from kmeans import Clusterer, flash_kmeans, ours

from codebook_tools.clustering.assignment import nearest, squared_errors
from codebook_tools.codebook import Codebook

TOLERANCES = (1e-2, 1e-3, 5e-4)


def points_of(count: int, dim: int, device: str) -> Tensor:
    """(count, dim) around 3,000 centres, a tenth as far from these as they lie apart."""
    drawn = torch.Generator().manual_seed(0)
    centres = torch.randn(3000, dim, generator=drawn)
    around = 0.1 * torch.randn(count, dim, generator=drawn)
    return (centres[torch.randint(3000, (count,), generator=drawn)] + around).to(device)


def inertia(points: Tensor, centroids: Tensor) -> float:
    """Mean squared distance to the nearest centroid."""
    codebook = Codebook(torch.as_tensor(centroids, dtype=torch.float32))
    return float(squared_errors(points, codebook, nearest(points, codebook)).mean())


def main() -> None:
    given = options(__doc__ or "")
    found: dict[str, Any] = {"skipped": [] if find_spec("flash_kmeans") else ["flash-kmeans is not installed"]}
    cases = ((4000, 8, 32),) if given.quick else ((1_000_000, 64, 512), (1_000_000, 8, 16_384))
    for count, dim, k in cases:
        points, rows = points_of(count, dim, given.device), []
        ways: dict[str, Clusterer] = {f"ours, tolerance {t:g}": ours(t) for t in TOLERANCES}
        if find_spec("flash_kmeans") and given.device.startswith("cuda"):
            ways["flash-kmeans, 60 iterations"] = flash_kmeans
        for name, way in ways.items():
            way(points[: 20 * k], k, 0)  # whatever is done once
            forget_peak(given.device)
            seconds, centroids = timed(given.device, partial(way, points, k, 0))
            left = inertia(points, centroids)
            rows.append({"way": name, "seconds": seconds, "inertia": left, "peak_bytes": peak(given.device)})
            found[f"{count:,} x {dim}, {k:,} clusters"] = rows
            write(given, found)
            print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
