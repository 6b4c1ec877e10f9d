"""What a beam search over residual levels gains, on a small model that is trained here.

    python benchmarks/beam.py [--steps 600] [--levels 4] [--k 64] [--widths 2,4,8,16]

A ResidualVQ of vector-quantize-pytorch between two convolutions, on the bundled sample of photographs; figures are of
its test patches. Takes less than two minutes of one core. Writes benchmarks/results/beam.json and beam.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import machine
from torch import Tensor, nn
from torch.nn import functional
from vector_quantize_pytorch import ResidualVQ  # type: ignore[import-untyped]

from codebook_tools.data.dataset import Media
from codebook_tools.data.images import Images, sample_images
from codebook_tools.data.splits import split
from codebook_tools.evaluation.metrics import psnr
from codebook_tools.evaluation.tables import in_markdown
from codebook_tools.runtime.progress import Watch
from codebook_tools.workflows.operate import measure_model
from codebook_tools.workflows.request import Request

RESULTS = Path(__file__).parent / "results"


class Autoencoder(nn.Module):
    """Images (n, 3, height, width) in [0, 1] -> latents (n, 16, height / 4, width / 4), and back."""

    def __init__(self, levels: int, k: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 48, 4, 2, 1), nn.ReLU(), nn.Conv2d(48, 96, 4, 2, 1), nn.ReLU(), nn.Conv2d(96, 16, 1)
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(16, 96, 3, 1, 1), nn.ReLU(), nn.ConvTranspose2d(96, 48, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(48, 3, 4, 2, 1),
        )  # fmt: skip
        self.vq = ResidualVQ(dim=16, codebook_size=k, num_quantizers=levels, kmeans_init=True, decay=0.95)

    def encode(self, images: Tensor) -> Tensor:
        latents: Tensor = self.encoder(images)
        return latents

    def decode(self, quantized: Tensor) -> Tensor:
        images: Tensor = self.decoder(quantized)
        return images


def make(levels: int, codebook_size: int) -> Autoencoder:
    return Autoencoder(levels, codebook_size)


def trained(steps: int, levels: int, k: int) -> Autoencoder:
    """On the patches that are no test data."""
    torch.manual_seed(0)
    network = make(levels, k)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    items = split(sample_images()).train
    _, images = Media(items, Images(channels=3)).load(items)
    for _ in range(steps):
        batch = images[torch.randint(len(images), (64,))]
        latents = network.encode(batch)
        quantized, _, commitment = network.vq(latents.flatten(2).mT)
        loss = functional.mse_loss(network.decode(quantized.mT.reshape(latents.shape)), batch) + 0.1 * commitment.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--widths", default="2,4,8,16")
    asked = parser.parse_args()
    since = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "residual.pt"
        torch.save(trained(asked.steps, asked.levels, asked.k).state_dict(), path)
        seconds = time.perf_counter() - since
        request = Request(
            model=path, network=partial(make, asked.levels), sample=True, input_range=(0.0, 1.0), metric="euclidean"
        )
        results = [measure_model(request, Watch(), beam=width) for width in map(int, asked.widths.split(","))]
    before = results[0].before
    assert before is not None
    gains: list[Any] = [result.to_json()["beam"] for result in results]
    greedy = {name: gains[0][name]["greedy"] for name in ("distortion", "mse")}
    rows = [("1, greedy", greedy), *((str(gain["width"]), {n: gain[n]["beam"] for n in greedy}) for gain in gains)]
    table = [("beam", "distortion", "of greedy", "mse", "PSNR, dB")]
    for name, row in rows:
        share = row["distortion"] / greedy["distortion"]
        figures = (f"{row['distortion']:.4g}", f"{share:.1%}", f"{row['mse']:.6f}", f"{psnr(row['mse']):.2f}")
        table.append((name, *figures))
    record = {
        "command": f"python benchmarks/beam.py {' '.join(sys.argv[1:])}".strip(),
        "machine": machine(),
        "levels": asked.levels,
        "k": asked.k,
        "steps": asked.steps,
        "training seconds": round(seconds, 1),
        "perplexity": [round(book.perplexity, 2) for book in before.codebooks],
        "beams": gains,
    }
    (RESULTS / "beam.json").write_text(json.dumps(record, indent=2) + "\n")
    (RESULTS / "beam.md").write_text(in_markdown(table))
    print(in_markdown(table))


if __name__ == "__main__":
    main()
