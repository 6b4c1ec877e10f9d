"""The losses of a run, as numbers: read seldom where a GPU would stand still for it, but none is lost."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from codebook_tools.runtime import distributed

EVERY, OTHERWISE = {"cpu": 1}, 10  # steps from one reading to the next, by the kind of device

SUM = "sum"
"""The name of the whole loss, beside those of its terms."""


class Readings:
    """every: the steps after which to `read`."""

    def __init__(self, device: torch.device) -> None:
        self.every = EVERY.get(device.type, OTHERWISE)
        self._names: list[str] = []
        self._unread: list[Tensor] = []

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """The terms of a step's loss by name, of this process' share."""
        self._names = [*terms]
        self._unread.append(torch.stack([*terms.values()]))

    def read(self, beside: Tensor) -> tuple[list[dict[str, float]], int]:
        """The terms, and SUM, of each step since the last reading, of all processes together; and the number `beside`
        them, a scalar that is the same on all. The host waits once for all of it."""
        steps = distributed.summed(torch.stack(self._unread))
        self._unread.clear()
        sums = steps.sum(1, keepdim=True)
        *found, (count, *_) = torch.cat([torch.cat([sums, steps], 1), beside.expand(1, steps.shape[1] + 1)]).tolist()
        return [{SUM: whole} | dict(zip(self._names, terms, strict=True)) for whole, *terms in found], int(count)
