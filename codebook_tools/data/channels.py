"""Decoded values in as many channels as a network takes: what media share of that."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MIX, FIRST = "mix", "first"
MIXINGS = (MIX, FIRST)
"""What --channels takes: what becomes of channels that the network has not. Without it nothing may be lost."""


def alike(values: NDArray[Any]) -> bool:
    """Whether all channels, along the first axis, hold the same: any one of them is the whole then."""
    return all(np.array_equal(values[0], other) for other in values[1:])


def repeated(values: NDArray[Any], channels: int) -> NDArray[Any]:
    """The first channel in each of so many."""
    return values[:1] if channels == 1 else np.repeat(values[:1], channels, axis=0)
