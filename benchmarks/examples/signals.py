"""Electrocardiograms: two seconds of one lead, and the VQ-VAE of van den Oord et al. in one dimension.

    codebook refit benchmarks/work/signals/model.pt --network benchmarks/examples/signals.py:make \\
        --data benchmarks/work/signals/data.npy --group benchmarks/work/signals/patients.npy --k 128

The network is that of the zalando tutorial, its convolutions in one dimension.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

RATE, SAMPLES = 128, 256  # samples a second, and of a window
PATIENTS, WINDOWS = 120, 24
WAVES = (  # of a beat: place in seconds after the R wave, width in seconds, height in millivolt
    (-0.18, 0.028, 0.15),  # P
    (-0.035, 0.010, -0.12),  # Q
    (0.0, 0.012, 1.1),  # R
    (0.035, 0.012, -0.25),  # S
    (0.26, 0.050, 0.30),  # T
)


class Residual(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.wide = nn.Conv1d(hidden, inner, 3, padding=1, bias=False)
        self.narrow = nn.Conv1d(inner, hidden, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.narrow(functional.relu(self.wide(functional.relu(x))))
        return x + changed


class SignalVQVAE(nn.Module):
    """Windows (n, 1, samples) in millivolt; latents (n, dim, samples / 4)."""

    def __init__(self, codebook_size: int = 512, hidden: int = 64, inner: int = 32, dim: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv1d(1, hidden // 2, 4, 2, 1),
            nn.ReLU(),
            nn.Conv1d(hidden // 2, hidden, 4, 2, 1),
            nn.ReLU(),
            nn.Conv1d(hidden, hidden, 3, padding=1),
            Residual(hidden, inner),
            Residual(hidden, inner),
            nn.ReLU(),
            nn.Conv1d(hidden, dim, 1),
        )
        self.codebook = nn.Embedding(codebook_size, dim)
        nn.init.uniform_(self.codebook.weight, -1 / codebook_size, 1 / codebook_size)
        self.decoder = nn.Sequential(
            nn.Conv1d(dim, hidden, 3, padding=1),
            Residual(hidden, inner),
            Residual(hidden, inner),
            nn.ReLU(),
            nn.ConvTranspose1d(hidden, hidden // 2, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose1d(hidden // 2, 1, 4, 2, 1),
        )

    def encode(self, windows: Tensor) -> Tensor:
        latents: Tensor = self.encoder(windows)
        return latents

    def decode(self, quantized: Tensor) -> Tensor:
        windows: Tensor = self.decoder(quantized)
        return windows


def make(codebook_size: int = 512) -> SignalVQVAE:
    return SignalVQVAE(codebook_size)


def data(seed: int = 0) -> dict[str, Any]:
    """Windows (2880, 1, 256) in millivolt, and the patient of each: beats as sums of five Gaussians, whose places,
    widths and heights are the patient's; a fifth of the patients have wide extra beats; baseline wander and noise.
    """
    drawn = np.random.default_rng(seed)
    time = np.arange(SAMPLES) / RATE
    windows = np.zeros((PATIENTS, WINDOWS, SAMPLES))
    for patient in range(PATIENTS):
        waves = np.array(WAVES) * drawn.normal(1, (0.08, 0.15, 0.25), (5, 3))
        interval = drawn.uniform(0.5, 1.1)
        extra = 0.25 if patient % 5 == 0 else 0.0
        for window in windows[patient]:
            beat = drawn.uniform(-interval, 0)
            while beat < time[-1] + 0.5:
                wide = drawn.random() < extra
                for place, width, height in waves[2:] if wide else waves:
                    width = 3 * width if wide else width
                    window += height * np.exp(-0.5 * ((time - beat - place) / width) ** 2)
                beat += interval * drawn.normal(1, 0.05) * (0.7 if wide else 1)
            window += 0.1 * np.sin(2 * np.pi * (drawn.uniform(0.1, 0.4) * time + drawn.random()))
            window += drawn.normal(0, 0.02, SAMPLES)
    return {
        "data.npy": windows.reshape(-1, 1, SAMPLES).astype(np.float32),
        "patients.npy": np.repeat(np.arange(PATIENTS), WINDOWS),
    }


def reconstruction_loss(network: nn.Module, reconstruction: Tensor, media: Tensor) -> Tensor:
    return functional.mse_loss(reconstruction, media) / torch.var(media)
