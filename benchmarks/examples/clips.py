"""Clips of moving digits, and a VQ-VAE of convolutions in three dimensions.

    codebook refit benchmarks/work/clips/model.pt --network benchmarks/examples/clips.py:make \\
        --data benchmarks/work/clips/data.npy --test-data benchmarks/work/clips/test.npy --k 128

Encoder and decoder are VideoGPT's, narrower and without its axial attention.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

CLIPS, TEST_CLIPS, FRAMES, SIDE = 1200, 200, 8, 32


class Residual(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.BatchNorm3d(hidden),
            nn.ReLU(),
            nn.Conv3d(hidden, hidden // 2, 3, padding=1, bias=False),
            nn.BatchNorm3d(hidden // 2),
            nn.ReLU(),
            nn.Conv3d(hidden // 2, hidden, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.block(x)
        return x + changed


class ClipVQVAE(nn.Module):
    """Clips (n, 1, frames, side, side), from -0.5 to 0.5; latents (n, dim, frames / 2, side / 4, side / 4)."""

    def __init__(self, codebook_size: int = 512, hidden: int = 32, dim: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv3d(1, hidden, 4, 2, 1),
            nn.ReLU(),
            nn.Conv3d(hidden, hidden, (3, 4, 4), (1, 2, 2), 1),
            nn.ReLU(),
            nn.Conv3d(hidden, hidden, 3, padding=1),
            Residual(hidden),
            Residual(hidden),
            nn.BatchNorm3d(hidden),
            nn.ReLU(),
            nn.Conv3d(hidden, dim, 1),
        )
        self.codebook = nn.Module()
        self.codebook.register_buffer("embeddings", torch.randn(codebook_size, dim))
        self.codebook.register_buffer("N", torch.zeros(codebook_size))
        self.codebook.register_buffer("z_avg", torch.zeros(codebook_size, dim))
        self.decoder = nn.Sequential(
            nn.Conv3d(dim, hidden, 1),
            Residual(hidden),
            Residual(hidden),
            nn.BatchNorm3d(hidden),
            nn.ReLU(),
            nn.ConvTranspose3d(hidden, hidden, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose3d(hidden, 1, (3, 4, 4), (1, 2, 2), 1),
        )

    def encode(self, clips: Tensor) -> Tensor:
        latents: Tensor = self.encoder(clips)
        return latents

    def decode(self, quantized: Tensor) -> Tensor:
        clips: Tensor = self.decoder(quantized)
        return clips


def make(codebook_size: int = 512) -> ClipVQVAE:
    return ClipVQVAE(codebook_size)


def data(seed: int = 0) -> dict[str, Any]:
    """Clips (n, 1, 8, 32, 32), from -0.5 to 0.5: two of scikit-learn's digits, twice as large, move in straight lines
    and bounce off the walls, as in Moving MNIST. The digits of the test clips are other ones.
    """
    drawn = np.random.default_rng(seed)
    digits = load_digits().images.repeat(2, 1).repeat(2, 2) / 16
    half = len(digits) * 3 // 4

    def clips(of: Any, count: int) -> Any:
        frames = np.zeros((count, FRAMES, SIDE, SIDE), np.float32)
        room = SIDE - 16
        for clip in frames:
            for _ in range(2):
                place, speed = drawn.uniform(0, room, 2), drawn.uniform(-3, 3, 2)
                digit = of[drawn.integers(len(of))]
                for time, frame in enumerate(clip):
                    y, x = (room - abs((place + time * speed) % (2 * room) - room)).round().astype(int)
                    np.maximum(frame[y : y + 16, x : x + 16], digit, out=frame[y : y + 16, x : x + 16])
        return frames[:, None] - 0.5

    return {"data.npy": clips(digits[:half], CLIPS), "test.npy": clips(digits[half:], TEST_CLIPS)}


def reconstruction_loss(network: nn.Module, reconstruction: Tensor, media: Tensor) -> Tensor:
    """Over the variance, as VideoGPT divides by that of its own data."""
    return functional.mse_loss(reconstruction, media) / torch.var(media)
