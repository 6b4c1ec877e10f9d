"""Embeddings of items, and an RQ-VAE of three levels that makes semantic ids of them.

    codebook refit benchmarks/work/items/model.safetensors --network benchmarks/examples/items.py:make \\
        --data benchmarks/work/items/data.npy --k 256

The network is TIGER's: layers of 512, 256 and 128, and codes of 32 dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

ITEMS, DIM, LEVELS = 4000, 768, 3
LAYERS = (DIM, 512, 256, 128, 32)


def layers(sizes: tuple[int, ...]) -> nn.Sequential:
    pairs = [(nn.Linear(i, o), nn.ReLU()) for i, o in pairwise(sizes)]
    return nn.Sequential(*[layer for pair in pairs for layer in pair][:-1])


class ItemRQVAE(nn.Module):
    """Items (n, 768); latents (n, 32)."""

    codebooks = tuple(f"levels.{level}.weight" for level in range(LEVELS))

    def __init__(self, codebook_size: int = 256) -> None:
        super().__init__()
        self.encoder, self.decoder = layers(LAYERS), layers(LAYERS[::-1])
        self.levels = nn.ModuleList(nn.Embedding(codebook_size, LAYERS[-1]) for _ in range(LEVELS))
        for parameter in self.levels.parameters():
            nn.init.uniform_(parameter, -1 / codebook_size, 1 / codebook_size)

    def encode(self, items: Tensor) -> Tensor:
        latents: Tensor = self.encoder(items)
        return latents

    def walk(self, latents: Tensor, quantize: Callable[[int, Tensor], Tensor]) -> Tensor:
        residual, total = latents, torch.zeros_like(latents)
        for level in range(LEVELS):
            quantized = quantize(level, residual)
            residual, total = residual - quantized, total + quantized
        return total

    def decode(self, quantized: Tensor) -> Tensor:
        items: Tensor = self.decoder(quantized)
        return items


def make(codebook_size: int = 256) -> ItemRQVAE:
    return ItemRQVAE(codebook_size)


def data(seed: int = 0) -> dict[str, Any]:
    """Items (4000, 768) of length 1, as a sentence encoder gives them: a tree of 12 departments of 16 categories of
    8 kinds, drawn as unevenly as a catalog is, and what is of one item alone.
    """
    drawn = np.random.default_rng(seed)
    kinds = np.zeros((1, DIM))
    for branches, spread in ((12, 1.0), (16, 0.7), (8, 0.5)):
        kinds = (kinds[:, None] + spread * drawn.normal(0, 1, (len(kinds), branches, DIM))).reshape(-1, DIM)
    often = drawn.pareto(1.5, len(kinds)) + 0.1
    chosen = drawn.choice(len(kinds), ITEMS, p=often / often.sum())
    own = drawn.normal(0, 1, (ITEMS, 64)) @ drawn.normal(0, 1 / 8, (64, DIM))
    items = kinds[chosen] + 0.5 * own + 1.5  # 1.5: sentence embeddings have a common part
    return {"data.npy": (items / np.linalg.norm(items, axis=1, keepdims=True)).astype(np.float32)}


def reconstruction_loss(network: nn.Module, reconstruction: Tensor, media: Tensor) -> Tensor:
    """A sum over dimensions, as TIGER has it."""
    return DIM * functional.mse_loss(reconstruction, media)
