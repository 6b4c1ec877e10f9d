"""Conversion of decoded values to the number of channels that a network takes, for all modalities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIX, FIRST = "mix", "first"
MIXINGS = (MIX, FIRST)
"""Choices of --channels: how surplus channels are reduced. Without that option no channel may be lost."""


def in_channels(
    values: NDArray[Any], channels: int, how: str | None, mix: Callable[[NDArray[Any]], NDArray[Any]]
) -> NDArray[Any] | None:
    """Convert decoded values to another number of channels.

    Args:
        values: (n, ...), channels first. Identical channels count as one, which is repeated without loss.
        channels: Number of channels of the result.
        how: One of MIXINGS; None if no channel may be lost.
        mix: Reduces (n, ...) to one channel (1, ...).

    Returns:
        (channels, ...); None where `how` does not permit the loss of channels.
    """
    if len(values) == channels:
        return values
    if how == FIRST and len(values) > channels:
        return values[:channels]
    if how == FIRST or all(np.array_equal(values[0], other) for other in values[1:]):
        return np.repeat(values[:1], channels, axis=0)
    return np.repeat(mix(values), channels, axis=0) if how == MIX else None
