"""Motion of a humanoid robot of 29 joints: two-second windows, and a residual VQ-VAE of three levels.

    codebook refit benchmarks/work/motion/model.pt --network benchmarks/examples/motion.py:make \\
        --data benchmarks/work/motion/data.npy --k 128

Encoder and decoder are those of T2M-GPT, narrower; the residual levels are MoMask's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

FRAMES, HERTZ, JOINTS, LEVELS = 64, 30, 29, 3
SIDES = tuple(range(6)), tuple(range(6, 12)), tuple(range(15, 22)), tuple(range(22, 29))
"""Left and right leg, left and right arm; 12 to 14 are the waist."""


class Dilated(nn.Module):
    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.wide = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.narrow = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.narrow(functional.relu(self.wide(functional.relu(x))))
        return x + changed


def blocks(width: int, reverse: bool) -> nn.Sequential:
    dilations = (9, 3, 1)
    return nn.Sequential(*(Dilated(width, dilation) for dilation in (dilations[::-1] if reverse else dilations)))


class MotionVQVAE(nn.Module):
    """Windows (n, frames, joints) in radians; latents (n, dim, frames / 4)."""

    mean: Tensor
    std: Tensor
    codebooks = tuple(f"quantizers.{level}.embedding.weight" for level in range(LEVELS))

    def __init__(self, codebook_size: int = 512, width: int = 64, dim: int = 64) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(JOINTS))
        self.register_buffer("std", torch.ones(JOINTS))
        self.encoder = nn.Sequential(
            nn.Conv1d(JOINTS, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(width, width, 4, 2, 1),
            blocks(width, reverse=False),
            nn.Conv1d(width, width, 4, 2, 1),
            blocks(width, reverse=False),
            nn.Conv1d(width, dim, 3, padding=1),
        )
        self.quantizers = nn.ModuleList(nn.Module() for _ in range(LEVELS))
        for quantizer in self.quantizers:
            quantizer.embedding = nn.Embedding(codebook_size, dim)
            nn.init.uniform_(quantizer.embedding.weight, -1 / codebook_size, 1 / codebook_size)
        self.decoder = nn.Sequential(
            nn.Conv1d(dim, width, 3, padding=1),
            nn.ReLU(),
            blocks(width, reverse=True),
            nn.Upsample(scale_factor=2),
            nn.Conv1d(width, width, 3, padding=1),
            blocks(width, reverse=True),
            nn.Upsample(scale_factor=2),
            nn.Conv1d(width, width, 3, padding=1),
            nn.Conv1d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(width, JOINTS, 3, padding=1),
        )

    def encode(self, windows: Tensor) -> Tensor:
        latents: Tensor = self.encoder(((windows - self.mean) / self.std).transpose(1, 2))
        return latents

    def walk(self, latents: Tensor, quantize: Callable[[int, Tensor], Tensor]) -> Tensor:
        residual, total = latents, torch.zeros_like(latents)
        for level in range(LEVELS):
            quantized = quantize(level, residual)
            residual, total = residual - quantized, total + quantized
        return total

    def decode(self, quantized: Tensor) -> Tensor:
        windows: Tensor = self.decoder(quantized).transpose(1, 2)
        return windows * self.std + self.mean


def make(codebook_size: int = 512) -> MotionVQVAE:
    return MotionVQVAE(codebook_size)


def data(seed: int = 0) -> dict[str, Any]:
    """Windows (3000, 64, 29) in radians: eight activities, whose joints move by harmonics of one frequency, left and
    right in turn or together; style, tempo and phase differ by window, and a part of them change the activity midway.
    """
    drawn = np.random.default_rng(seed)
    activities = []
    for activity in range(8):
        rest = drawn.normal(0, 0.3, JOINTS)
        swing = drawn.gamma(1.2, 0.25, (2, JOINTS)) / np.array([[1], [2]])
        phase = drawn.uniform(0, 1, (2, JOINTS))
        for left, right in (SIDES[:2], SIDES[2:]):
            rest[list(right)], swing[:, list(right)] = rest[list(left)], swing[:, list(left)]
            phase[:, list(right)] = phase[:, list(left)] + np.array([[0.5], [0]]) * (activity % 2)
        activities.append((rest, swing, phase, drawn.uniform(0.4, 1.6)))
    time = np.arange(FRAMES)[:, None] / HERTZ

    def one() -> Any:
        rest, swing, phase, tempo = activities[drawn.integers(8)]
        cycles = tempo * drawn.uniform(0.7, 1.3) * time + drawn.random()
        moved = rest + drawn.normal(0, 0.1, JOINTS)
        for harmonic in (1, 2):
            size = swing[harmonic - 1] * drawn.uniform(0.6, 1.4, JOINTS)
            moved = moved + size * np.sin(2 * np.pi * (harmonic * cycles + phase[harmonic - 1]))
        return moved

    def window() -> Any:
        if drawn.random() < 0.7:
            return one()
        share = 1 / (1 + np.exp(-8 * (time - drawn.uniform(0.3, 1.8))))
        return (1 - share) * one() + share * one()

    windows = np.stack([window() for _ in range(3000)]) + drawn.normal(0, 0.01, (3000, FRAMES, JOINTS))
    return {"data.npy": windows.astype(np.float32)}


def reconstruction_loss(network: nn.Module, reconstruction: Tensor, media: Tensor) -> Tensor:
    """Of normalized angles, and half that of their velocities: T2M-GPT's, with its smooth L1."""
    std = network.get_buffer("std")
    restored, angles = reconstruction / std, media / std
    velocities = functional.smooth_l1_loss(restored.diff(dim=1), angles.diff(dim=1))
    return functional.smooth_l1_loss(restored, angles) + 0.5 * velocities
