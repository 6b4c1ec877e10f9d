"""Sounds that measures of speech take for speech: harmonics of a gliding pitch, in syllables, over a little noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def voice(rate: int, seconds: float, seed: int = 0) -> NDArray[np.float32]:
    """(samples,) float32."""
    time = np.arange(round(rate * seconds)) / rate
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.7 * time + seed)) / rate
    harmonics = np.sum([np.sin(k * phase) / k for k in range(1, 20)], axis=0)
    syllables = np.clip(np.sin(2 * np.pi * 2.5 * time + seed), 0, None)
    noise = np.random.default_rng(seed).standard_normal(len(time))
    return (0.15 * harmonics * syllables + 0.001 * noise).astype(np.float32)


def damaged(wave: NDArray[np.float32], seed: int = 0) -> NDArray[np.float32]:
    """With a tenth of its loudness in noise, and offset."""
    noise = np.random.default_rng(seed).standard_normal(wave.shape) * wave.std() / 10
    return (0.9 * wave + noise + 0.01).astype(np.float32)
