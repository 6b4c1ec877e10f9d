"""The nearest code: ours, certified to the last tie, against faiss, torch.cdist, and the matrix product alone.

    python benchmarks/assignment.py [--device cpu|cuda] [--runs 5]

A million points of 64 dimensions against 512 codes, and 200,000 of 256 against 16,384, standard normal; all in turn in
one process. Ours decides in float64 where float32 cannot tell two codes apart, and takes the lowest index among equals;
the others do not. Writes benchmarks/results/assignment.json, or --output.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from machine import machine
from torch import Tensor

from codebook_tools.clustering.assignment import nearest
from codebook_tools.codebook import Codebook

CASES = ((1_000_000, 64, 512), (200_000, 256, 16_384))
SCORES = 1 << 26
"""That the others hold at a time: torch.cdist would take 13 GB at once."""


def by_cdist(points: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([torch.cdist(rows, codes).argmin(1) for rows in torch.split(points, SCORES // len(codes))])


def product_alone(points: Tensor, codes: Tensor) -> Tensor:
    for rows in torch.split(points, SCORES // len(codes)):
        last = rows @ codes.T
    return last


def faiss_search(points: Tensor, codes: Tensor) -> Tensor:
    import faiss

    index = faiss.IndexFlatL2(codes.shape[1])
    index.add(codes.numpy())
    return torch.from_numpy(index.search(points.numpy(), 1)[1][:, 0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "assignment.json")
    given = parser.parse_args()
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "ours": lambda points, codes: nearest(points, Codebook(codes)),
        "torch.cdist and argmin": by_cdist,
        "matrix product alone": product_alone,
    }
    if given.device == "cpu" and find_spec("faiss"):
        ways["faiss IndexFlatL2"] = faiss_search
    found: dict[str, Any] = {"machine": machine(given.device)}
    for n, dim, k in CASES:
        drawn = torch.Generator().manual_seed(0)
        points, codes = torch.randn(n, dim, generator=drawn), torch.randn(k, dim, generator=drawn)
        points, codes = points.to(given.device), codes.to(given.device)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for run in range(given.runs + 1):
            for name, way in ways.items():
                since = time.perf_counter()
                way(points, codes)
                if points.is_cuda:
                    torch.cuda.synchronize()
                if run:  # the first is for whatever is done once
                    seconds[name].append(time.perf_counter() - since)
        medians = {name: statistics.median(its) for name, its in seconds.items()}
        found[f"{n:,} x {dim}, {k:,} codes"] = {
            "seconds": {
                name: {"median": medians[name], "all": [round(s, 4) for s in its]} for name, its in seconds.items()
            },
            "times_ours": {name: round(its / medians["ours"], 2) for name, its in medians.items()},
        }
        print(f"{n:,} x {dim}, {k:,} codes:", {name: f"{its:.3f} s" for name, its in medians.items()})
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
