"""Decoded values in as many channels as a network takes: what media share of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIX, FIRST = "mix", "first"
MIXINGS = (MIX, FIRST)
"""What --channels takes: what becomes of channels that the network has not. Without it nothing may be lost."""


def in_channels(
    values: NDArray[Any], channels: int, how: str | None, mix: Callable[[NDArray[Any]], NDArray[Any]]
) -> NDArray[Any] | None:
    """Decoded values in another number of channels.

    Args:
        values: (n, ...), channels along the first axis. Of channels that are all alike any one is the whole.
        channels: How many there are to be.
        how: One of MIXINGS; None: no channel may be lost.
        mix: Channels (n, ...) to the one (1, ...) that stands for all.

    Returns:
        (channels, ...), or None where channels would be lost that must not be.
    """
    if len(values) == channels:
        return values
    if how == FIRST and len(values) > channels:
        return values[:channels]
    if how == FIRST or all(np.array_equal(values[0], other) for other in values[1:]):
        return np.repeat(values[:1], channels, axis=0)
    return np.repeat(mix(values), channels, axis=0) if how == MIX else None
