"""The losses of all steps as numbers, read rarely where reading makes the host wait for a GPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from codebook_tools.runtime import distributed

EVERY, OTHERWISE = {"cpu": 1}, 10  # steps from one reading to the next, by the kind of device

SUM = "sum"
"""The name of the total loss, beside those of its terms."""


class LossLog:
    """Losses on a device until they are read.

    Attributes:
        every: Steps from one `read` to the next.
    """

    def __init__(self, device: torch.device) -> None:
        self.every = EVERY.get(device.type, OTHERWISE)
        self._names: list[str] = []
        self._unread: list[Tensor] = []

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Append the terms of a step's loss by name, scalars: this process's part of them."""
        self._names = [*terms]
        self._unread.append(torch.stack([*terms.values()]))

    def read(self, beside: Tensor) -> tuple[list[dict[str, float]], int]:
        """Move the unread losses to the host, which waits once.

        Args:
            beside: A scalar to read along with them, the same on all processes.

        Returns:
            The terms and SUM of each step since the last reading, summed over processes; and the value of `beside`.
        """
        steps = distributed.summed(torch.stack(self._unread))
        self._unread.clear()
        sums = steps.sum(1, keepdim=True)
        *rows, (count, *_) = torch.cat([torch.cat([sums, steps], 1), beside.expand(1, steps.shape[1] + 1)]).tolist()
        return [{SUM: whole} | dict(zip(self._names, terms, strict=True)) for whole, *terms in rows], int(count)
