"""Sounds for tests: drawn, stored as files, and found again."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import soundfile
from drawing import put_bytes as put_bytes
from numpy.typing import NDArray

from codebook_tools.data.audio import Waveforms
from codebook_tools.data.items import Item, find_items

Wave = NDArray[np.float32]
RATE = 8000


def sine(hertz: float, rate: int, seconds: float) -> Wave:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def sweep(rate: int, seconds: float) -> Wave:
    """From silence to a tenth of the rate, so that no two stretches of it are alike."""
    time = np.arange(round(rate * seconds)) / rate
    return (0.5 * np.sin(np.pi * 0.1 * rate / seconds * time**2)).astype(np.float32)


def stored(wave: NDArray[np.generic], rate: int = RATE, kind: str = "WAV", subtype: str | None = "FLOAT") -> bytes:
    """wave: (samples,) or (samples, channels)."""
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind, subtype=subtype)
    return file.getvalue()


def find_clips(*paths: Path, rate: int = RATE, hop: int = 1, size: int | None = None) -> list[Item]:
    """Clips in the order of their names and, within a file, of their numbers."""
    items = find_items(paths, Waveforms(rate=rate, stride=hop, size=size))
    return sorted(items, key=lambda item: (str(item.group), int(item.name.rpartition("#")[2])))
