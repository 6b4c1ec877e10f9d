"""Train the bundled demo checkpoint: a VQ-VAE whose codebook collapses by itself.

    python benchmarks/train_demo.py codebook_tools/models/demo.safetensors

The network and the loss are the zalando tutorial's: codebook at U(-1/K, 1/K), codebook and commitment losses by
gradient, Adam at 1e-3, nothing against collapse and nothing for it. The images are the training part of the bundled
sample (patches of the two photographs that scikit-learn ships); its validation and test patches are never seen.

Snapshots at three ages go to build/demo-STEPS.safetensors, for `python benchmarks/compare.py demo-age-250 ...`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from codebook_tools.clustering.assignment import nearest
from codebook_tools.codebook import Codebook
from codebook_tools.data.dataset import Media
from codebook_tools.data.images import Images, sample_images
from codebook_tools.data.splits import split
from codebook_tools.models.networks.zalando import make

BUILD = Path(__file__).parents[1] / "build"
SNAPSHOTS = (250, 1000, 4000)


def train(path: Path, steps: int, batch: int, seed: int) -> None:
    torch.manual_seed(seed)
    items = split(sample_images()).train
    _, decoded = Media(items, Images()).load(items)
    patches = decoded * 2 - 1
    network = make(codebook_size=512, hidden=64, residual=32, depth=2, dim=64)
    codes = network.get_submodule("_vq_vae._embedding")
    assert isinstance(codes, torch.nn.Embedding)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    variance = patches.var()
    for step in range(1, steps + 1):
        pixels = patches[torch.randint(len(patches), (batch,))]
        latents = network.encode(pixels)
        rows = latents.movedim(1, -1)
        chosen = nearest(rows.detach().flatten(0, -2), Codebook(codes.weight.detach())).reshape(rows.shape[:-1])
        quantised = codes(chosen).movedim(-1, 1)
        shown = network.decode(latents + (quantised - latents).detach())
        loss = functional.mse_loss(shown, pixels) / variance + functional.mse_loss(quantised, latents.detach())
        loss = loss + 0.25 * functional.mse_loss(latents, quantised.detach())
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        if step % 250 == 0:
            print(
                f"step {step}: loss {float(loss.detach()):.4f}, {len(torch.unique(chosen))} codes in the batch",
                flush=True,
            )
        if step in SNAPSHOTS:
            save(network, BUILD / f"demo-{step}.safetensors")
    save(network, path)


def save(network: nn.Module, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    tensors = {key: tensor.contiguous() for key, tensor in network.state_dict().items()}
    save_file(tensors, path, {"format": "pt"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    train(given.output, given.steps, given.batch, given.seed)
