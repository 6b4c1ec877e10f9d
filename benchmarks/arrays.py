"""Many rows: the memory of `measure` and `encode` over 2 and 20 million vectors, and their speed beside a bare loop.

    python benchmarks/arrays.py --work work -o benchmarks/results/arrays.json

Vectors are 64 float16; the network is an RQ-VAE of linear layers with two residual codebooks of 256. Memory is RssAnon,
what is not of files, read of the running command. The bare loop maps the file, and encodes, searches, decodes and adds
up errors in batches of the same size, without anything else; it runs over the smaller file, before and after.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from safetensors.torch import save_file
from torch import Tensor, nn

DIM, INNER, CODE, K = 64, 128, 32, 256
BATCH = (1 << 18) // DIM  # as the package takes small rows
SIZES = (2_000_000, 20_000_000)


class RQVAE(nn.Module):
    """Vectors through linear layers and two residual codebooks."""

    codebooks = ("stages.0.weight", "stages.1.weight")

    def __init__(self, codebook_size: int = K) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(DIM, INNER), nn.ReLU(), nn.Linear(INNER, CODE))
        self.decoder = nn.Sequential(nn.Linear(CODE, INNER), nn.ReLU(), nn.Linear(INNER, DIM))
        self.stages = nn.ModuleList(nn.Embedding(codebook_size, CODE) for _ in range(2))

    @property
    def tables(self) -> list[Tensor]:
        """(K, 32) of each stage."""
        return [self.get_parameter(name) for name in self.codebooks]

    def encode(self, vectors: Tensor) -> Tensor:
        """(n, 64) -> (n, 32)."""
        return torch.as_tensor(self.encoder(vectors))

    def walk(self, latents: Tensor, quantize: Any) -> Tensor:
        """The sum of what both stages emit."""
        first = quantize(0, latents)
        return torch.as_tensor(first + quantize(1, latents - first))

    def decode(self, quantized: Tensor) -> Tensor:
        """(n, 32) -> (n, 64)."""
        return torch.as_tensor(self.decoder(quantized))


def write_data(path: Path, rows: int) -> None:
    """Vectors around 512 centers; a file of that size that is there is kept."""
    if path.exists() and np.load(path, mmap_mode="r").shape == (rows, DIM):
        return
    random = np.random.default_rng(0)
    centers = random.normal(size=(512, DIM)).astype(np.float32)
    mapped = np.lib.format.open_memmap(path, "w+", np.float16, (rows, DIM))
    for start in range(0, rows, 1 << 18):
        stop = min(rows, start + (1 << 18))
        noise = random.normal(scale=0.3, size=(stop - start, DIM)).astype(np.float32)
        mapped[start:stop] = centers[random.integers(0, 512, stop - start)] + noise
    mapped.flush()


def bare_loop(network: RQVAE, path: Path) -> float:
    """Seconds to map, encode, quantize, decode and compare all rows."""
    books = network.tables

    def nearest(stage: int, latents: Tensor) -> Tensor:
        book = books[stage]
        return torch.as_tensor(book[(latents @ book.T - book.square().sum(1) / 2).argmax(1)])

    start, error = time.perf_counter(), 0.0
    rows = np.load(path, mmap_mode="r")
    with torch.inference_mode():
        for at in range(0, len(rows), BATCH):
            batch = torch.from_numpy(rows[at : at + BATCH].astype(np.float32))
            made = network.decode(network.walk(network.encode(batch), nearest))
            error += float((made - batch).square().sum())
    return time.perf_counter() - start


def run(command: list[str]) -> tuple[dict[str, Any], float, int]:
    """The JSON of a command, its seconds, and the largest RssAnon in bytes."""
    start, most = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                most = max(most, *(1024 * int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line))
            except (OSError, TypeError, ValueError):
                pass
            time.sleep(0.05)
        out, err = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {err}")
    return json.loads(out), time.perf_counter() - start, most


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder with 3 GB of space")
    parser.add_argument("--output", "-o", type=Path, required=True)
    parser.add_argument("--sizes", type=lambda text: [int(size) for size in text.split(",")], default=SIZES)
    parser.add_argument("--commands", type=lambda text: text.split(","), default=["measure", "encode"])
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    network = RQVAE()
    model = asked.work / "rqvae.safetensors"
    rows_of: dict[str, Any] = {}
    for size in asked.sizes:
        data = asked.work / f"{size}.npy"
        write_data(data, size)
        with torch.no_grad():  # codes among the latents, so that they are used
            latents = network.encode(torch.from_numpy(np.load(data, mmap_mode="r")[:K].astype(np.float32)))
            network.tables[0].copy_(latents)
            network.tables[1].copy_(0.3 * torch.randn(K, CODE, generator=torch.Generator().manual_seed(0)))
        save_file(network.state_dict(), model)
        common = [str(model), "--network", f"{Path(__file__)}:RQVAE", "--modality", "arrays", "--json"]
        codebook = [sys.executable, "-m", "codebook_tools"]
        tokens = asked.work / "tokens.npy"
        commands = {
            "measure": [*codebook, "measure", *common, "--test-data", str(data)],
            "encode": [*codebook, "encode", *common, "--data", str(data), "-o", str(tokens), "--force"],
        }
        measured: dict[str, Any] = {"bare loop, seconds": bare_loop(network, data)} if size == min(asked.sizes) else {}
        for name in asked.commands:
            command = commands[name]
            result, seconds, most = run(command)
            measured[name] = {"seconds": seconds, "RssAnon": most, "phases": result["seconds"]}
            tokens.unlink(missing_ok=True)
        if size == min(asked.sizes):
            measured["bare loop again, seconds"] = bare_loop(network, data)
        rows_of[f"{size:,}"] = measured
        print(json.dumps(measured, indent=1), flush=True)
    results = {"machine": machine(), "command": " ".join(["python", *sys.argv]), "rows": rows_of}
    asked.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
