"""Train an example whose codebooks collapse by themselves, and write its data and weights to benchmarks/work/NAME/.

    python benchmarks/examples/train.py signals motion items clips

A recipe is the published one of the network, but for its width and the number of steps; what the published code does
against collapse (revival of dead codes, k-means initialization) is left out, as its own options or its copies do.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from codebook_tools.clustering.assignment import nearest
from codebook_tools.codebook import Codebook

WORK = Path(__file__).parents[1] / "work"


@dataclass(frozen=True)
class Recipe:
    """How an example is trained.

    Attributes:
        source: Of the recipe.
        file: Of the weights.
        codes: Of each level.
        codebooks: The keys of the codebooks, in the order of the levels.
        update: Gradients, with a codebook loss; or the moving average, of codes that start at N(0, 1).
        rate: Learning rate.
        optimizer: Of torch.optim.
        betas: Of the optimizer.
        codebook: Weight of the codebook loss.
        commitment: Weight of the commitment loss.
        batch: Items to a step.
        steps: Of the optimizer.
        warmup: Steps in which the learning rate rises.
    """

    source: str
    file: str
    codes: int
    codebooks: tuple[str, ...]
    update: Literal["gradient", "ema"]
    rate: float
    commitment: float
    batch: int
    steps: int
    optimizer: Literal["Adam", "AdamW"] = "Adam"
    betas: tuple[float, float] = (0.9, 0.999)
    codebook: float = 1.0
    warmup: int = 0


RECIPES = {
    "signals": Recipe(
        source="zalandoresearch/pytorch-vq-vae, without its moving average: van den Oord et al. 2017",
        file="model.pt",
        codes=512,
        codebooks=("codebook.weight",),
        update="gradient",
        rate=1e-3,
        commitment=0.25,
        batch=32,
        steps=2000,
    ),
    "motion": Recipe(
        source="T2M-GPT, --quantizer orig: its paper's naive VQ-VAE; residual levels as in MoMask",
        file="model.pt",
        codes=512,
        codebooks=tuple(f"quantizers.{level}.embedding.weight" for level in range(3)),
        update="gradient",
        rate=2e-4,
        codebook=0.02,
        commitment=0.02,
        batch=64,
        steps=1500,
        optimizer="AdamW",
        betas=(0.9, 0.99),
        warmup=100,
    ),
    "items": Recipe(
        source="TIGER, whose losses are sums over dimensions; LC-Rec's optimizer, without --kmeans_init",
        file="model.safetensors",
        codes=256,
        codebooks=tuple(f"levels.{level}.weight" for level in range(3)),
        update="gradient",
        rate=1e-3,
        codebook=32,
        commitment=0.25 * 32,
        batch=256,
        steps=2000,
        optimizer="AdamW",
    ),
    "clips": Recipe(
        source="VideoGPT, with the moving average of zalandoresearch/pytorch-vq-vae in place of its restarts",
        file="model.pt",
        codes=512,
        codebooks=("codebook.embeddings",),
        update="ema",
        rate=7e-4,
        commitment=0.25,
        batch=24,
        steps=500,
    ),
}


class Quantizer:
    """The nearest codes of all levels, with straight-through gradients, and how they learn.

    Attributes:
        losses: Codebook and commitment losses of the last step.
        used: Codes that its latents chose, by level.
    """

    DECAY, SMOOTHING = 0.99, 1e-5

    def __init__(self, network: nn.Module, recipe: Recipe) -> None:
        state = network.state_dict(keep_vars=True)
        self.recipe = recipe
        self.codes = [state[key] for key in recipe.codebooks]
        self.counts = [torch.zeros(len(codes)) for codes in self.codes]
        self.sums = [codes.detach().clone() for codes in self.codes]
        self.losses = list[Tensor]()
        self.used = [0] * len(self.codes)

    def __call__(self, level: int, latents: Tensor) -> Tensor:
        """Latents (n, dim, *grid) -> their codes, of the same shape."""
        codes, rows = self.codes[level], latents.movedim(1, -1)
        flat = rows.detach().flatten(0, -2)
        chosen = nearest(flat, Codebook(codes.detach()))
        self.used[level] = len(torch.unique(chosen))
        quantized = functional.embedding(chosen, codes).reshape(rows.shape).movedim(-1, 1)
        if self.recipe.update == "gradient":
            self.losses.append(self.recipe.codebook * functional.mse_loss(quantized, latents.detach()))
        else:
            self._average(level, flat, chosen)
        self.losses.append(self.recipe.commitment * functional.mse_loss(latents, quantized.detach()))
        return latents + (quantized - latents).detach()

    @torch.no_grad()
    def _average(self, level: int, rows: Tensor, chosen: Tensor) -> None:
        codes, counts, sums = self.codes[level], self.counts[level], self.sums[level]
        counts.mul_(self.DECAY).add_(torch.bincount(chosen, minlength=len(codes)), alpha=1 - self.DECAY)
        sums.mul_(self.DECAY).index_add_(0, chosen, rows, alpha=1 - self.DECAY)
        total = counts.sum()
        smoothed = (counts + self.SMOOTHING) / (total + len(codes) * self.SMOOTHING) * total
        codes.copy_(sums / smoothed[:, None])


def train(name: str, seed: int = 0) -> dict[str, Any]:
    """Data and weights are written; returns how it went."""
    torch.manual_seed(seed)
    example, recipe, folder = import_module(name), RECIPES[name], WORK / name
    folder.mkdir(parents=True, exist_ok=True)
    files = example.data()
    for file, array in files.items():
        np.save(folder / file, array)
    media = torch.from_numpy(files["data.npy"])
    network: Any = example.make(recipe.codes)
    buffers = dict(network.named_buffers())
    if "std" in buffers:
        buffers["std"].copy_(media.std((0, 1)))
        buffers["mean"].copy_(media.mean((0, 1)))
    optimizer = getattr(torch.optim, recipe.optimizer)(network.parameters(), lr=recipe.rate, betas=recipe.betas)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, recipe.warmup)))
    quantizer = Quantizer(network, recipe)
    walk: Callable[..., Tensor] = getattr(network, "walk", lambda latents, quantize: quantize(0, latents))
    since, cpu_since = time.perf_counter(), time.process_time()
    for step in range(1, recipe.steps + 1):
        batch = media[torch.randint(len(media), (recipe.batch,))]
        quantizer.losses.clear()
        reconstruction = network.decode(walk(network.encode(batch), quantizer))
        error = example.reconstruction_loss(network, reconstruction, batch)
        optimizer.zero_grad()
        torch.autograd.backward(error + sum(quantizer.losses))
        optimizer.step()
        warm.step()
        if step % 100 == 0:
            seconds = time.perf_counter() - since
            loss, used = float(error.detach()), quantizer.used
            print(f"{name} {step}: {loss:.4f}, used in a batch {used}, {seconds:.0f} s", flush=True)
    state = {key: tensor.detach().contiguous() for key, tensor in network.state_dict().items()}
    if "codebook.z_avg" in state:
        state["codebook.N"].copy_(quantizer.counts[0])
        state["codebook.z_avg"].copy_(quantizer.sums[0])
    if recipe.file.endswith(".pt"):
        torch.save(state, folder / recipe.file)
    else:
        save_file(state, folder / recipe.file)
    seconds = time.process_time() - cpu_since
    training = {"seed": seed, "loss": float(error.detach()), "cpu_seconds": round(seconds), "recipe": asdict(recipe)}
    (folder / "training.json").write_text(json.dumps(training, indent=2) + "\n")
    return training


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=tuple(RECIPES))
    for name in parser.parse_args().names:
        train(name)
