"""A prior's vocabulary after a surgery on the codes in it, and the rows that embedding, head and bias then have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from codebook_tools.codebook import REMOVED
from codebook_tools.remapping.index_map import IndexMap
from codebook_tools.remapping.token_ids import Counts


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Codes from `offset` on, among ids that keep their place beside them. multiple: what the rows are padded to."""

    codes: IndexMap
    offset: int = 0
    multiple: int = 1

    @property
    def end(self) -> int:
        """The id after the last code."""
        return self.offset + self.codes.old_size

    @cached_property
    def bereft(self) -> Tensor:
        """(new codes,) bool: those that are no old one's."""
        bereft = torch.ones(self.codes.size, dtype=torch.bool)
        bereft[self.codes.index_map[self.codes.index_map != REMOVED]] = False
        return bereft

    @cached_property
    def heir(self) -> Tensor:
        """(old codes,) int64, the new code that inherits each one's row, REMOVED where none does.

        Codes that kept their identity, or were merged, hand theirs on. A removed code's row goes to its nearest where
        that is no old code's, and is dropped elsewhere, so that an exact prune stays exact.
        """
        return torch.where(self.bereft[self.codes.nearest], self.codes.nearest, self.codes.index_map)

    @cached_property
    def inherited(self) -> Tensor:
        """(new codes,) int64, how many rows each inherits."""
        return torch.bincount(self.heir[self.heir != REMOVED], minlength=self.codes.size)

    @property
    def merged(self) -> int:
        """New codes that inherit several rows, which no linear layer can do exactly."""
        return int((self.inherited > 1).sum())

    def rows(self, before: int) -> int:
        """How many there are where there were `before`."""
        return math.ceil((before - self.codes.old_size + self.codes.size) / self.multiple) * self.multiple

    def new_id(self, old: int) -> int:
        """A removed code's id becomes its nearest's."""
        code = old - self.offset
        if 0 <= code < self.codes.old_size:
            return self.offset + int(self.codes.nearest[code])
        return old if code < 0 else old - self.codes.old_size + self.codes.size

    def counts(self, rows: int) -> Counts:
        """Of a vocabulary of so many rows: those that are elsewhere now, or nowhere, and those of removed codes."""
        lost = self.codes.index_map == REMOVED
        after = rows - self.offset - self.codes.old_size if self.codes.size != self.codes.old_size else 0
        elsewhere = int((self.heir != torch.arange(self.codes.old_size)).sum())
        return Counts(rows, elsewhere + after, int(lost.sum()), int((lost & (self.heir != REMOVED)).sum()))

    def new_rows(self, old: Tensor) -> Tensor:
        """(rows before, ...) of an embedding or a head -> (rows, ...) in the same dtype.

        A code that inherits several rows gets their mean, each weighing alike, and one that inherits none the mean of
        all codes, as new tokens best start (Hewitt 2021). Rows of padding are zero.
        """
        return self._with_codes(old, self._means(old), 0.0)

    def new_bias(self, old: Tensor) -> Tensor:
        """(rows before,) -> (rows,): as `new_rows`, plus log n where n codes are merged.

        A merged code's probability is the sum of n. The mean of n logits plus log n is exact where they are equal and
        never too high (Jensen). Ids of padding get the lowest number there is, so they are never drawn.
        """
        gained = self.inherited.clamp(min=1).double().log()
        return self._with_codes(old, self._means(old) + gained, torch.finfo(old.dtype).min)

    def _means(self, old: Tensor) -> Tensor:
        """In float64, in which a single row stays what it was, to the last bit."""
        codes = old[self.offset : self.offset + self.codes.old_size].double()
        kept = self.heir != REMOVED
        sums = codes.new_zeros(len(self.inherited), *codes.shape[1:]).index_add_(0, self.heir[kept], codes[kept])
        counts = self.inherited.reshape(-1, *[1] * (codes.ndim - 1))
        return torch.where(counts > 0, sums / counts.clamp(min=1), codes.mean(0))

    def _with_codes(self, old: Tensor, codes: Tensor, filler: float) -> Tensor:
        end = self.offset + self.codes.old_size
        new = torch.cat([old[: self.offset], codes.to(old.dtype), old[end:]])
        return torch.cat([new, new.new_full((self.rows(len(old)) - len(new), *old.shape[1:]), filler)])


@dataclass(frozen=True, eq=False)
class JointVocabulary:
    """The codes of several codebooks one after another in one vocabulary, as heads over all stages of a residual model
    have them. parts: one for each codebook, each with its own offset among the old ids; padding is the first one's."""

    parts: tuple[Vocabulary, ...]

    @staticmethod
    def of(vocabularies: Sequence[Vocabulary]) -> JointVocabulary:
        """Codebooks in the order of their stages, from the offset of the first on."""
        offset, parts = vocabularies[0].offset, list[Vocabulary]()
        for one in vocabularies:
            parts.append(replace(one, offset=offset, multiple=1 if parts else one.multiple))
            offset += one.codes.old_size
        return JointVocabulary(tuple(parts))

    @property
    def multiple(self) -> int:
        """What the rows are padded to."""
        return self.parts[0].multiple

    @property
    def end(self) -> int:
        """The id after the last code."""
        return self.parts[-1].offset + self.parts[-1].codes.old_size

    def rows(self, before: int) -> int:
        """How many there are where there were `before`."""
        for one in reversed(self.parts):  # the last first, so that offsets before it hold
            before = one.rows(before)
        return before

    def new_id(self, old: int) -> int:
        """An id after the surgeries."""
        for one in reversed(self.parts):
            old = one.new_id(old)
        return old

    def counts(self, rows: int) -> Counts:
        """As of one codebook; ids are counted once."""
        old = range(self.parts[0].offset, self.end)
        changed = sum(self.new_id(i) != i for i in old)
        shifted = rows - self.end if self.rows(rows) != rows else 0
        each = [one.counts(one.offset + one.codes.old_size) for one in self.parts]
        return Counts(rows, changed + shifted, sum(one.removed for one in each), sum(one.nearest for one in each))

    def new_rows(self, old: Tensor) -> Tensor:
        """As `Vocabulary.new_rows`, codebook by codebook."""
        for one in reversed(self.parts):
            old = one.new_rows(old)
        return old

    def new_bias(self, old: Tensor) -> Tensor:
        """As `Vocabulary.new_bias`, codebook by codebook."""
        for one in reversed(self.parts):
            old = one.new_bias(old)
        return old
