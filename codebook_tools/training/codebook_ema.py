"""A codebook in training: nearest codes, the codebook EMA, and the revival of dead codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from codebook_tools.clustering.balanced import Emphasis
from codebook_tools.clustering.pnn import merge_pairs
from codebook_tools.codebook import REMOVED
from codebook_tools.models.model import Book, Model
from codebook_tools.runtime import distributed
from codebook_tools.runtime.devices import sent

DECAY = 0.95  # of the codebook EMA: shorter than usual (0.99), for latents move fast at this learning rate
REVIVE_EVERY = 10
DEAD_BELOW = 0.03  # of the mean usage of a code: a code below is dead


@dataclass(frozen=True, eq=False)
class ExtraCodes:
    """A larger codebook that a fine-tuning starts with and merges on the way.

    Attributes:
        vectors: (n, dim) float32.
        counts: (n,), assignments per code over the calibration data.
    """

    vectors: Tensor
    counts: Tensor


class CodebookEMA:
    """One codebook in training: assignment, an exponential moving average of its codes, and revival of dead ones.

    Attributes:
        model: The model in training; the codes are those of its book.
        stage: Index of the book.
        moves: Whether the average moves the codes, or only tracks their usage.
        random: Generator that revivals draw from, in the same state on every process.
        power: Of the distance to its latents, whose mean a code minimizes: 2, or less for balanced codes (balanced.py).
        usage: (size,) float32, running fraction of a batch's tokens that are assigned to each code.
        sums: (size, dim) float32, running sum of the latents of each code, each times its weight, over the sum of the
            weights in a batch.
        mass: (size,) float32, running sum of these weights; `usage` itself where all weigh alike.
        revived: (size,) bool, codes that were moved to a latent.
        merged: (n,) int64, for each of the extra codes at the start the code that it was merged into, REMOVED where it
            had been revived; None before any merge.
    """

    def __init__(
        self, model: Model, stage: int, counts: Tensor, moves: bool, random: torch.Generator, power: float = 2.0
    ) -> None:
        """Start the average at `counts` (size,), assignments per code over the calibration data."""
        self.model, self.stage, self.moves, self.random, self.power = model, stage, moves, random, power
        self.merged: Tensor | None = None
        self.begin(counts)

    def begin(self, counts: Tensor) -> None:
        """Start the average anew at the codes as they are. counts: (size,), assignments per code."""
        self.revived = torch.zeros(len(counts), dtype=torch.bool, device=self.model.device)
        # Fractions, so that the scale of the counts does not matter.
        self.usage = (counts.float() / counts.sum().clamp(min=1)).to(self.model.device)
        self._weigh()
        self.sums = self.book.vectors.detach() * self.usage[:, None]

    def _weigh(self) -> None:
        """Start the running sum of weights at the usage."""
        self.mass = self.usage if self.power == 2 else self.usage.clone()

    def widen(self, extra: ExtraCodes) -> None:
        """Replace the codes by a larger codebook."""
        self.book.vectors = extra.vectors.to(self.model.device).clone()
        self.begin(extra.counts)

    def merge(self, size: int) -> None:
        """Merge the cheapest pairs of codes (pnn.py), weighted by running usage, until `size` codes are left."""
        # Pairs of dead ones must have a mean, too.
        weights = self.usage.cpu().double().clamp(min=1e-9 / len(self.usage))
        emitted = self.book.codebook.emitted  # a stored row may have any length where it is emitted at unit length
        labels = torch.from_numpy(merge_pairs(emitted.cpu().double().numpy(), weights.numpy(), size)[1])
        labels = distributed.of_first(labels)
        self.merged = labels.masked_fill(self.revived.cpu(), REMOVED)
        self.revived = self.revived.new_zeros(size)
        labels, usage = labels.to(self.model.device), weights.float().to(self.model.device)
        weighted = self.book.vectors * usage[:, None]
        self.sums = weighted.new_zeros(size, weighted.shape[1]).index_add_(0, labels, weighted)
        self.usage = usage.new_zeros(size).index_add_(0, labels, usage)
        self._weigh()
        self.book.vectors = self.sums / self.usage[:, None]

    @property
    def book(self) -> Book:
        """The model's book of this stage."""
        return self.model.books[self.stage]

    @property
    def in_use(self) -> Tensor:
        """Scalar int64 on the device: codes that are not dead, by running usage."""
        return (self.usage >= DEAD_BELOW / len(self.usage)).sum()

    def __call__(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize latents.

        Args:
            latents: (n, dim, *grid).

        Returns:
            Their codes (n, *grid) int64, and what the decoder gets (n, dim, *grid), with gradients to the codebook.
        """
        codes = self.model.assign(latents.detach(), self.stage, wait=False)
        return codes, self.model.embed_trained(codes, self.stage)

    def state(self) -> dict[str, Tensor]:
        """All that `update` changes by name, except for the codes (the model's) and the state of `random`."""
        merged = {} if self.merged is None else {"merged": self.merged}
        mass = {} if self.power == 2 else {"mass": self.mass}
        return {"shares": self.usage, "sums": self.sums, "revived": self.revived, **mass, **merged}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.usage, self.sums, self.revived = (
            state[name].to(self.model.device) for name in ("shares", "sums", "revived")
        )
        self._weigh()
        if self.power != 2:
            self.mass = state["mass"].to(self.model.device)
        self.merged = state.get("merged")

    def update(self, latents: Tensor, codes: Tensor, revive: bool) -> None:
        """Update the averages after a training step, without making the host wait for a GPU.

        Args:
            latents: (n, dim, *grid), this process's latents of the step.
            codes: (n, *grid) int64, their codes at the beginning of the step.
            revive: Whether dead codes are moved to latents, too.
        """
        rows, flat = self.book.metric.emit(latents.movedim(1, -1).flatten(0, -2).float()), codes.flatten()
        # A column of ones counts the assignments along with the sums; floats count exactly up to 16 million.
        ones = rows.new_ones(len(rows), 1)
        columns = torch.cat([rows, ones], 1)
        if self.power != 2:
            errors = (rows - self.book.codebook.emitted[flat]).square().sum(1)
            by_distance = Emphasis.of(distributed.gathered(errors), self.power).weights(errors)[:, None]
            columns = torch.cat([rows * by_distance, by_distance, ones], 1)
        totals = distributed.summed(rows.new_zeros(len(self.usage), columns.shape[1]).index_add_(0, flat, columns))
        usage = totals[:, -1] / totals[:, -1].sum()
        self.usage.lerp_(usage, 1 - DECAY)
        if not self.moves:
            return
        mass = totals[:, rows.shape[1]]
        total = mass.sum()
        if self.power != 2:
            self.mass.lerp_(mass / total, 1 - DECAY)
        self.sums.lerp_(totals[:, : rows.shape[1]] / total, 1 - DECAY)
        self.book.vectors = torch.where((usage > 0)[:, None], self.sums / self.mass[:, None], self.book.vectors)
        if revive:
            self._revive(rows, flat)

    def _revive(self, rows: Tensor, codes: Tensor) -> None:
        """Move dead codes to latents of this batch, drawn by `power` of the error, and give them the mean usage."""
        dead = self.usage < DEAD_BELOW / len(self.usage)
        if _surely_none(dead):
            return
        errors = distributed.gathered((rows - self.book.vectors[codes]).square().sum(1)) ** (self.power / 2)
        rank = dead.cumsum(0) - 1  # of a dead code, among the dead ones
        dead &= rank < (errors > 0).sum()
        if _surely_none(dead):
            return
        drawn = distributed.gathered(rows)[self._drawn(errors, int(dead.sum()) if dead.is_cpu else len(dead))]
        placed = drawn[rank.clamp(0, len(drawn) - 1)]
        self.book.vectors = torch.where(dead[:, None], placed, self.book.vectors)
        self.sums = torch.where(dead[:, None], placed / len(self.usage), self.sums)
        self.usage.masked_fill_(dead, 1 / len(self.usage))
        self.mass.masked_fill_(dead, 1 / len(self.usage))
        self.revived |= dead

    def _drawn(self, errors: Tensor, most: int) -> Tensor:
        """(most,) int64, or fewer: rows drawn by errors (n,) without replacement.

        Those of the largest error over a draw from the exponential distribution, as in torch.multinomial; so the host
        need not know how many errors are above 0. The draws are made on the CPU, the same on every process.
        """
        waits = torch.empty(len(errors)).exponential_(generator=self.random)
        return (errors / sent(waits, errors.device)).topk(min(most, len(errors))).indices


def _surely_none(mask: Tensor) -> bool:
    """Whether nothing in a mask is true, where the host can tell without waiting for a device."""
    return mask.is_cpu and not bool(mask.any())
