"""How cost grows: time and peak memory of a refit with the number N of latents, seconds of k-means with K and D.

    python benchmarks/scaling.py [--latents 2000000 20000000] [--points 200000] [--device cpu]

Writes benchmarks/results/scaling.json. Every figure is of a process of its own, that of memory its highest resident
set. A refit is `codebook refit --latents FILE --k 128 --steps 0` on N x 64 float32 from a Gaussian mixture, which is
made in build/scaling (256 bytes a latent) and removed again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from large import ROOT, TELL
from machine import machine
from safetensors.torch import save_file

BUILD = ROOT / "build" / "scaling"
DIM, CODES, K = 64, 512, 128
MIXTURE = 1000
CHUNK = 1_000_000

REFIT = "import runpy; runpy.run_module('codebook_tools', run_name='__main__')"
KMEANS = """
import json, sys, time
import torch
from codebook_tools.clustering.kmeans import kmeans
from codebook_tools.runtime.progress import Watch
n, k, dim = map(int, sys.argv[1:4])
drawn = torch.Generator().manual_seed(0)
centres = 3 * torch.randn(1000, dim, generator=drawn)
points = centres[torch.randint(len(centres), (n,), generator=drawn)] + torch.randn(n, dim, generator=drawn)
points = points.to(sys.argv[4])
since = time.perf_counter()
found = kmeans(points, k, watch=Watch())
seconds = time.perf_counter() - since
print(json.dumps({"seconds": seconds, "iterations": found.iterations, "inertia": found.inertia / n}))
"""


def told(program: str, *arguments: object) -> tuple[Any, float]:
    """The JSON that a program prints in a process of its own, and its highest resident memory in MB."""
    command = [sys.executable, "-c", TELL + program, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout), int(done.stderr.split()[-1]) / 1024


def make(counts: list[int]) -> Path:
    """A codebook, and files of latents, the smaller ones the heads of the larger."""
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    rng = np.random.default_rng(0)
    centres = 3 * rng.standard_normal((MIXTURE, DIM), dtype=np.float32)
    files = [np.lib.format.open_memmap(BUILD / f"{n}.npy", "w+", np.float32, (n, DIM)) for n in counts]
    for start in range(0, max(counts), CHUNK):
        chunk = centres[rng.integers(MIXTURE, size=CHUNK)] + rng.standard_normal((CHUNK, DIM), dtype=np.float32)
        for file in files:
            file[start : start + CHUNK] = chunk[: max(0, len(file) - start)]
    model = BUILD / "model.safetensors"
    save_file({"quantize.embedding.weight": torch.from_numpy(centres[:CODES].copy())}, model)
    return model


def refit(model: Path, latents: int, device: str) -> dict[str, object]:
    to = ("--device", device, "-o", BUILD / "refitted.safetensors", "--force", "--json")
    asked = ("refit", model, "--latents", BUILD / f"{latents}.npy", "--k", K, "--steps", 0, *to)
    found, memory = told(REFIT, *asked)
    return {"latents": latents, "memory_mb": round(memory, 1), "seconds": found["seconds"]}


def clustered(points: int, k: int, dim: int, device: str) -> dict[str, object]:
    found, memory = told(KMEANS, points, k, dim, device)
    return {"points": points, "k": k, "dim": dim, **found, "memory_mb": round(memory, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, nargs="+", default=[2_000_000, 20_000_000])
    parser.add_argument("--points", type=int, default=200_000)
    parser.add_argument("--k", type=int, nargs="+", default=[64, 256, 1024, 4096, 16_384])
    parser.add_argument("--dim", type=int, nargs="+", default=[8, 16, 64, 256, 768])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "scaling.json")
    given = parser.parse_args()
    model = make(given.latents)
    refits = [refit(model, n, given.device) for n in given.latents]
    shutil.rmtree(BUILD)
    found: dict[str, Any] = {
        "command": f"python benchmarks/scaling.py {' '.join(sys.argv[1:])}".strip(),
        "machine": machine(given.device),
        "refit": refits,
        "memory_ratio": max(one["memory_mb"] for one in refits) / min(one["memory_mb"] for one in refits),  # type: ignore[type-var, operator]
        "k-means by K": [clustered(given.points, k, DIM, given.device) for k in given.k],
        "k-means by D": [clustered(given.points, given.k[1], dim, given.device) for dim in given.dim],
    }
    given.output.write_text(json.dumps(found, indent=2) + "\n")
    for one in found["refit"]:
        print(f"{one['latents']:,} latents: {one['seconds']['total']:.1f} s, {one['memory_mb']:.0f} MB")
    for one in [*found["k-means by K"], *found["k-means by D"]]:
        print(f"{one['points']:,} x {one['dim']}, K={one['k']}: {one['seconds']:.2f} s")


if __name__ == "__main__":
    main()
