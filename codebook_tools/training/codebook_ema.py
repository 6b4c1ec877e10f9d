"""The codes of a book in training: nearest ones, their moving average, and the revival of the dead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from codebook_tools.clustering.pnn import merge_pairs
from codebook_tools.codebook import REMOVED
from codebook_tools.models.model import Book, Model
from codebook_tools.runtime import distributed
from codebook_tools.runtime.devices import sent

DECAY = 0.95  # of the EMA codebook: shorter than usual (0.99), for latents move fast at this learning rate
REVIVE_EVERY = 10
DEAD_BELOW = 0.03  # of the mean hits of a code: fewer, and it is dead


@dataclass(frozen=True, eq=False)
class More:
    """Codes that a book begins a fine-tuning with, to be merged on the way. vectors: (n, dim), counts: (n,), their
    assignments over the calibration data."""

    vectors: Tensor
    counts: Tensor


class Quantiser:
    """Nearest codes of one book in training, and their own movement: an exponential moving average, with revival.

    counts: (size,) int64 or float, assignments per code over the calibration data, where the average starts. moves:
    whether it moves the codes, or only counts. random: what revivals draw from, the same on every process. merged: (n,)
    int64, of the more codes that there were at first, those that each is part of; REMOVED where it had been revived.
    """

    def __init__(self, model: Model, stage: int, counts: Tensor, moves: bool, random: torch.Generator) -> None:
        self.model, self.stage, self.moves, self.random = model, stage, moves, random
        self.merged: Tensor | None = None
        self._begin(counts)

    def _begin(self, counts: Tensor) -> None:
        self.revived = torch.zeros(len(counts), dtype=torch.bool, device=self.model.device)
        shares = counts.float() / counts.sum().clamp(min=1)
        self.shares = shares.to(self.model.device)  # of a batch's tokens, so that batch size does not matter
        self.sums = self.book.vectors.detach() * self.shares[:, None]

    def widen(self, more: More) -> None:
        """Go on with more codes, in place of those there are."""
        self.book.vectors = more.vectors.to(self.model.device).clone()
        self._begin(more.counts)

    def merge(self, size: int) -> None:
        """Merge pairs of codes, those that cost least (pnn.py) by the average of their use, until `size` are left."""
        # Pairs of dead ones must have a mean, too.
        weights = self.shares.cpu().double().clamp(min=1e-9 / len(self.shares))
        emitted = self.book.codebook.emitted  # a stored row may have any length where it is emitted at unit length
        _, found = merge_pairs(emitted.cpu().double().numpy(), weights.numpy(), size)
        labels = distributed.of_first(torch.from_numpy(found))
        self.merged = labels.masked_fill(self.revived.cpu(), REMOVED)
        self.revived = self.revived.new_zeros(size)
        at, shares = (of_codes.to(self.model.device) for of_codes in (labels, weights.float()))
        sums = (self.book.vectors * shares[:, None]).new_zeros(size, self.book.vectors.shape[1])
        self.sums = sums.index_add_(0, at, self.book.vectors * shares[:, None])
        self.shares = shares.new_zeros(size).index_add_(0, at, shares)
        self.book.vectors = self.sums / self.shares[:, None]

    @property
    def book(self) -> Book:
        return self.model.books[self.stage]

    @property
    def in_use(self) -> Tensor:
        """Codes that are not dead, by the running average: a scalar on the device."""
        return (self.shares >= DEAD_BELOW / len(self.shares)).sum()

    def __call__(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """latents (n, dim, *grid) -> codes (n, *grid), and what the decoder gets, with gradients to the codes."""
        codes = self.model.assign(latents.detach(), self.stage, wait=False)
        return codes, self.model.embed_trained(codes, self.stage)

    def state(self) -> dict[str, Tensor]:
        """All that `update` changes, but for the codes, which are the model's, and for what revivals draw from."""
        merged = {} if self.merged is None else {"merged": self.merged}
        return {"shares": self.shares, "sums": self.sums, "revived": self.revived, **merged}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self.shares, self.sums, self.revived = (
            state[name].to(self.model.device) for name in ("shares", "sums", "revived")
        )
        self.merged = state.get("merged")

    def update(self, latents: Tensor, codes: Tensor, revive: bool) -> None:
        """Move the codes after a step: latents (n, dim, *grid), their codes (n, *grid) at its beginning; of several
        processes, each brings what it saw. revive: the dead among them, too.

        Nothing here waits for a GPU.
        """
        rows, flat = self.book.metric.emit(latents.movedim(1, -1).flatten(0, -2).float()), codes.flatten()
        # A column of ones counts the hits along with the sums; floats count exactly up to 16 million.
        ones = rows.new_ones(len(rows), 1)
        found = rows.new_zeros(len(self.shares), rows.shape[1] + 1).index_add_(0, flat, torch.cat([rows, ones], 1))
        found = distributed.summed(found)
        found /= found[:, -1].sum()
        hits, sums = found[:, -1], found[:, :-1]
        self.shares.lerp_(hits, 1 - DECAY)
        if not self.moves:
            return
        self.sums.lerp_(sums, 1 - DECAY)
        self.book.vectors = torch.where((hits > 0)[:, None], self.sums / self.shares[:, None], self.book.vectors)
        if revive:
            self._revive(rows, flat)

    def _revive(self, rows: Tensor, codes: Tensor) -> None:
        """Put dead codes at latents of this batch, drawn by their squared error, with the mean share of a code."""
        dead = self.shares < DEAD_BELOW / len(self.shares)
        if _surely_none(dead):
            return
        errors = distributed.gathered((rows - self.book.vectors[codes]).square().sum(1))
        rank = dead.cumsum(0) - 1  # of a dead code, among them
        dead &= rank < (errors > 0).sum()
        if _surely_none(dead):
            return
        drawn = distributed.gathered(rows)[self._drawn(errors, int(dead.sum()) if dead.is_cpu else len(dead))]
        share, placed = 1 / len(self.shares), drawn[rank.clamp(0, len(drawn) - 1)]
        self.book.vectors = torch.where(dead[:, None], placed, self.book.vectors)
        self.sums = torch.where(dead[:, None], placed / len(self.shares), self.sums)
        self.shares.masked_fill_(dead, share)
        self.revived |= dead

    def _drawn(self, errors: Tensor, most: int) -> Tensor:
        """(most,) int64, or as many as there are: places drawn one after the other by errors (n,), each once.

        Those of the largest error over a draw from the exponential distribution, as torch.multinomial has it, for which
        the host need not know how many errors there are above 0. The draws are the CPU's, the same on every process.
        """
        waits = torch.empty(len(errors)).exponential_(generator=self.random)
        return (errors / sent(waits, errors.device)).topk(min(most, len(errors))).indices


def _surely_none(mask: Tensor) -> bool:
    """Whether nothing in a mask is true, where the host can tell without waiting for a device."""
    return mask.is_cpu and not bool(mask.any())
