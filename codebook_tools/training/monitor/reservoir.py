"""A sample of the latents of the last training steps, kept on their device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from codebook_tools.runtime import distributed
from codebook_tools.runtime.devices import sent
from codebook_tools.training.monitor.reading import Call

STEPS = 20  # that the sample is of: latents of an encoder that trained on since would mislead
_ROWS, _ROWS_PER_CODE = 8192, 32  # as many a code as k-means begins with


class Reservoir:
    """Rows drawn alike from each step; new ones take the place of the oldest.

    Attributes:
        capacity: Rows at most.
        per_step: Rows that are drawn from one call.
    """

    def __init__(self, size: int, seed: int) -> None:
        """A reservoir for a codebook of `size` codes, drawn by `seed`, apart from torch's own random numbers."""
        self.capacity = max(_ROWS, _ROWS_PER_CODE * size)
        self.per_step = math.ceil(self.capacity / STEPS)
        self._seed = seed
        self._random = torch.Generator().manual_seed(seed)
        self._rows: Tensor | None = None
        self._valid: Tensor | None = None
        self._at = self._count = 0

    def add(self, call: Call) -> None:
        """Draw from the latents of a call; those of negative codes, and what is not finite, are left out."""
        rows, codes = call.latents, call.codes_of_latents
        if rows is None or codes is None or not len(rows):
            return
        if self._rows is None or self._valid is None:
            self._rows = rows.new_empty(self.capacity, rows.shape[1])
            self._valid = torch.zeros(self.capacity, dtype=torch.bool, device=rows.device)
        n = min(self.per_step, len(rows))
        drawn = sent(torch.randint(len(rows), (n,), generator=self._random), rows.device)
        places = (torch.arange(n, device=rows.device) + self._at) % self.capacity
        self._rows[places] = rows[drawn]
        self._valid[places] = (codes.to(rows.device) >= 0)[drawn] & rows[drawn].isfinite().all(1)
        self._at = (self._at + n) % self.capacity
        self._count = min(self._count + n, self.capacity)

    def rows(self, most: int, steps: int = STEPS) -> Tensor:
        """The newest rows of all processes, in random order.

        Args:
            most: Rows at most.
            steps: Of which they are at most.

        Returns:
            (n, dim) float32, the same on all processes.
        """
        own = torch.zeros(0, 0)
        if self._rows is not None and self._valid is not None:
            n = min(self._count, steps * self.per_step)
            newest = (self._at - 1 - torch.arange(n, device=self._rows.device)) % self.capacity
            own = self._rows[newest][self._valid[newest]][: math.ceil(most / distributed.count())]
        dim = max(distributed.each(own.shape[1]))  # 0 on a process whose quantizer was not called
        rows = distributed.gathered(own if len(own) else own.new_zeros(0, dim))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self._seed))
        return rows[order.to(rows.device)]
