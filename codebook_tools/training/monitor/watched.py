"""One codebook of a monitor: its calls are read, counted and sampled, and its codes moved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from codebook_tools.codebook import Metric
from codebook_tools.errors import CodebookError
from codebook_tools.runtime import distributed
from codebook_tools.training.monitor import acting
from codebook_tools.training.monitor.hooks import Hooks
from codebook_tools.training.monitor.quantizers import Quantizer
from codebook_tools.training.monitor.reading import SAMPLE, Call, Reader
from codebook_tools.training.monitor.reservoir import Reservoir
from codebook_tools.training.monitor.tally import Figures, Tally

_DRAWN_FROM, _DRAWN_FROM_PER_CODE = 4096, 8  # latents that revived codes are drawn from
_REFIT_FROM_PER_CODE = 8  # latents, at least; a Re-Fit waits for them


class Watched:
    """A quantizer and what is known of it.

    Attributes:
        quantizer: The quantizer.
        refit_due: Whether a Re-Fit waits for enough latents.
    """

    def __init__(self, quantizer: Quantizer, seed: int, act: bool) -> None:
        """act: whether codes will be moved. Raises CodebookError where they cannot be."""
        if act:
            acting.require_movable(quantizer)
        size = quantizer.book.size
        self.quantizer, self._seed, self.refit_due = quantizer, seed, False
        self._reservoir = Reservoir(size, seed) if act else None
        most = max(SAMPLE, 0 if self._reservoir is None else self._reservoir.per_step)
        self._reader, self._tally = Reader(quantizer, most, seed), Tally(size)
        self._judged = torch.zeros(size, dtype=torch.int64)  # counts up to the last revival
        self._revived = 0

    def listen(self, hooks: Hooks) -> None:
        """Read all calls of the quantizer."""
        hooks.listen(self.quantizer.caller, self.quantizer.method, self._reader.begin, self._add)
        if self.quantizer.embedding is not None:
            hooks.listen(self.quantizer.embedding, "forward", lambda: None, self._look_up)

    def read(self, inputs: tuple[Any, ...], codes: Tensor) -> None:
        """Count codes, with their latents among the inputs, as a call would."""
        self._reader.begin()
        self._add(inputs, {}, codes)

    def _look_up(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        indices = next(one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
        self._reader.look_up(indices)
        if not self._reader.called:  # as where a training step calls the parts of a network, and never the whole
            self._tally.add(Call(indices.flatten().long()))

    def _add(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = self._reader.end(args, kwargs, output)
        self._tally.add(call)
        if self._reservoir is not None:
            self._reservoir.add(call)

    def figures(self, revives: bool) -> Figures:
        """Figures since the last call, over all processes. revives: whether to say how many codes were revived."""
        figures = self._tally.figures()
        if revives:
            figures["revived"], self._revived = self._revived, 0
        return figures

    def revive(self, optimizer: torch.optim.Optimizer, steps: int, step: int) -> None:
        """Move codes that are dead since the last revival. steps: since then. step: which makes the draws new."""
        counts = self._tally.counts.clone()
        dead = acting.dead_codes(distributed.summed(counts - self._judged.to(counts.device)).cpu())
        if dead is None:
            return
        self._judged = counts
        if bool(dead.any()):
            rows = self._rows(max(_DRAWN_FROM, _DRAWN_FROM_PER_CODE * int(dead.sum())), steps)
            self._revived += acting.revive(self.quantizer, self._metric(), dead, rows, self._seed + step, optimizer)

    def refit(self, optimizer: torch.optim.Optimizer) -> None:
        """Replace all codes by centroids of the reservoir, once that has enough latents."""
        assert self._reservoir is not None
        rows = self._rows(self._reservoir.capacity)
        if len(rows) < _REFIT_FROM_PER_CODE * self.quantizer.book.size:
            return
        acting.refit(self.quantizer, self._metric(), rows, self._seed, optimizer)
        self.refit_due, self._judged = False, self._tally.counts.clone()

    def _rows(self, most: int, steps: int | None = None) -> Tensor:
        assert self._reservoir is not None
        return self._reservoir.rows(most) if steps is None else self._reservoir.rows(most, steps)

    def _metric(self) -> Metric:
        """That of rank 0, for all processes."""
        metric = distributed.of_first(None if self._reader.layout is None else self._reader.layout.metric)
        if metric is None:
            raise CodebookError(
                f"{self.quantizer.book.key}: the latents that its codes stand for are not among the inputs and outputs "
                f"of {type(self.quantizer.caller).__name__}; give codes=lambda output: (codes, latents)"
            )
        return metric
