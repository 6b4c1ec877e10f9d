"""What counting by a CodebookMonitor costs of a training step.

    OMP_NUM_THREADS=1 python benchmarks/monitor.py [--pairs 30] [--steps 4] [--device cpu]

Blocks of steps with a monitor and without one take turns in one process, and each pair gives a ratio of times: of the
processor on a CPU, of the clock on a GPU. One thread: of several, those that wait would count. Three trainings: the
zalando tutorial's VQ-VAE on images, a ResidualVQ of vector-quantize-pytorch, and an RQ-VAE of item embeddings, whose
network is small. Writes benchmarks/results/monitor.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from machine import machine
from torch import Tensor, nn
from torch.nn import functional
from vector_quantize_pytorch import ResidualVQ, VectorQuantize  # type: ignore[import-untyped]

from codebook_tools import CodebookMonitor
from codebook_tools.models.networks.zalando import make

RESULTS = Path(__file__).parent / "results"


class Zalando(nn.Module):
    """The tutorial's network around a quantizer of its size: images (n, 3, 32, 32)."""

    shape = (64, 3, 32, 32)

    def __init__(self) -> None:
        super().__init__()
        self.net = make()
        del self.net._vq_vae
        self.vq = VectorQuantize(dim=64, codebook_size=512, accept_image_fmap=True)

    def forward(self, images: Tensor) -> Tensor:
        """The loss."""
        quantized, _, loss = self.vq(self.net.encode(images))
        total: Tensor = functional.mse_loss(self.net.decode(quantized), images) + loss.sum()
        return total


class Residual(Zalando):
    """The same with eight residual stages."""

    def __init__(self) -> None:
        super().__init__()
        self.vq = ResidualVQ(dim=64, codebook_size=512, num_quantizers=8)

    def forward(self, images: Tensor) -> Tensor:
        """The loss."""
        latents = self.net.encode(images)
        quantized, _, loss = self.vq(latents.flatten(2).mT)
        total: Tensor = functional.mse_loss(self.net.decode(quantized.mT.reshape(latents.shape)), images) + loss.sum()
        return total


class Items(nn.Module):
    """TIGER's RQ-VAE: item embeddings (n, 768), three levels of 256 codes in 32 dimensions."""

    shape = (1024, 768)

    def __init__(self) -> None:
        super().__init__()
        widths = (768, 512, 256, 128, 32)
        self.encoder, self.decoder = _layers(widths), _layers(widths[::-1])
        self.vq = ResidualVQ(dim=32, codebook_size=256, num_quantizers=3)

    def forward(self, items: Tensor) -> Tensor:
        """The loss."""
        quantized, _, loss = self.vq(self.encoder(items)[None])
        total: Tensor = functional.mse_loss(self.decoder(quantized[0]), items) + loss.sum()
        return total


def _layers(widths: tuple[int, ...]) -> nn.Sequential:
    parts = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*parts[:-1])


TRAININGS: dict[str, Callable[[], nn.Module]] = {"vq-vae": Zalando, "residual": Residual, "items": Items}


def ratios(name: str, pairs: int, steps: int, device: str) -> tuple[list[float], float]:
    """The time with a monitor over that without, of each pair; and the median seconds of a step without."""
    torch.manual_seed(0)
    model: Any = TRAININGS[name]().to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    batch = torch.rand(model.shape, device=device)

    def block(count: int) -> float:
        """Seconds of that many steps."""
        since = _now(device)
        for _ in range(count):
            optimizer.zero_grad()
            model(batch).backward()
            optimizer.step()
        return _now(device) - since

    block(3)
    results, alone = list[float](), list[float]()
    for pair in range(pairs):
        seconds = dict[bool, float]()
        for watched in (pair % 2 == 0, pair % 2 == 1):
            monitor = CodebookMonitor(model) if watched else None
            block(1)  # in the first call the monitor finds the latents
            seconds[watched] = block(steps)
            if monitor is not None:
                monitor.epoch()
                monitor.close()
        results.append(seconds[True] / seconds[False])
        alone.append(seconds[False] / steps)
    return results, median(alone)


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.get_device_module(torch.device(device)).synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "monitor.json")
    asked = parser.parse_args()
    record: dict[str, Any] = {
        "command": f"OMP_NUM_THREADS=1 python benchmarks/monitor.py {' '.join(sys.argv[1:])}".strip(),
        "machine": machine(asked.device),
        "pairs": asked.pairs,
        "steps": asked.steps,
        "trainings": {},
    }
    for name in TRAININGS:
        measured, seconds = ratios(name, asked.pairs, asked.steps, asked.device)
        low, _, high = quantiles(measured, n=4)
        record["trainings"][name] = {
            "milliseconds of a step": round(1000 * seconds, 2),
            "overhead": round(median(measured) - 1, 5),
            "quartiles": [round(low - 1, 5), round(high - 1, 5)],
        }
        print(name, record["trainings"][name])
    asked.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
