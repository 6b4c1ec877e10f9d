"""A prior's vocabulary after a surgery on its codes, and the new rows of embedding, head and bias."""

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
    """The codes of one codebook among other ids, which keep their place before and after the codes.

    Attributes:
        codes: The index map.
        offset: The id of code 0.
        multiple: What the number of ids is padded to.
    """

    codes: IndexMap
    offset: int = 0
    multiple: int = 1

    @property
    def parts(self) -> tuple[Vocabulary, ...]:
        """This vocabulary alone, as JointVocabulary has several."""
        return (self,)

    @property
    def end(self) -> int:
        """The id after the last old code."""
        return self.offset + self.codes.old_size

    @cached_property
    def unmatched(self) -> Tensor:
        """(new codes,) bool, the new codes that no old code became."""
        unmatched = torch.ones(self.codes.size, dtype=torch.bool)
        unmatched[self.codes.index_map[self.codes.index_map != REMOVED]] = False
        return unmatched

    @cached_property
    def heir(self) -> Tensor:
        """(old codes,) int64, the new code that inherits the row of each, REMOVED where none does.

        A code that kept its identity or was merged hands its row to its new code. A removed code hands it to the
        nearest new code where that one is unmatched; elsewhere it is dropped, so that an exact prune stays exact.
        """
        return torch.where(self.unmatched[self.codes.nearest], self.codes.nearest, self.codes.index_map)

    @cached_property
    def inherited(self) -> Tensor:
        """(new codes,) int64, how many rows each inherits. Several are one only approximately in a linear layer."""
        return torch.bincount(self.heir[self.heir != REMOVED], minlength=self.codes.size)

    def rows(self, before: int) -> int:
        """Number of rows after the surgery of a table that had `before` rows."""
        return math.ceil((before - self.codes.old_size + self.codes.size) / self.multiple) * self.multiple

    def new_id(self, old: int) -> int:
        """The id after the surgery; that of a removed code becomes that of the nearest one."""
        code = old - self.offset
        if 0 <= code < self.codes.old_size:
            return self.offset + int(self.codes.nearest[code])
        return old if code < 0 else old - self.codes.old_size + self.codes.size

    def counts(self, rows: int) -> Counts:
        """Count the rows, of `rows` before, that moved or were dropped, and those of removed codes."""
        lost = self.codes.index_map == REMOVED
        after = rows - self.offset - self.codes.old_size if self.codes.size != self.codes.old_size else 0
        elsewhere = int((self.heir != torch.arange(self.codes.old_size)).sum())
        return Counts(rows, elsewhere + after, int(lost.sum()), int((lost & (self.heir != REMOVED)).sum()))

    def new_rows(self, old: Tensor) -> Tensor:
        """The rows of an embedding or a head after the surgery.

        A code that inherits several rows gets their unweighted mean. One that inherits none gets the mean of all codes,
        the best initial value of a new token (Hewitt 2021). Rows of padding are zero.

        Args:
            old: (rows before, ...).

        Returns:
            (rows, ...) in the same dtype.
        """
        return self._with_codes(old, self._means(old), 0.0)

    def new_bias(self, old: Tensor) -> Tensor:
        """The bias of a head after the surgery: as `new_rows`, plus log n where n codes are merged.

        A merged code's probability is the sum of n. The mean of n logits plus log n is exact where they are equal and
        never too high (Jensen). Padding gets the lowest number of the dtype, so that it is never sampled.

        Args:
            old: (rows before,).

        Returns:
            (rows,) in the same dtype.
        """
        gained = self.inherited.clamp(min=1).double().log()
        return self._with_codes(old, self._means(old) + gained, torch.finfo(old.dtype).min)

    def _means(self, old: Tensor) -> Tensor:
        """(new codes, ...) float64, in which a single row stays the same to the last bit."""
        codes = old[self.offset : self.end].double()
        handed_on = self.heir != REMOVED
        sums = codes.new_zeros(len(self.inherited), *codes.shape[1:])
        sums.index_add_(0, self.heir[handed_on], codes[handed_on])
        counts = self.inherited.reshape(-1, *[1] * (codes.ndim - 1))
        return torch.where(counts > 0, sums / counts.clamp(min=1), codes.mean(0))

    def _with_codes(self, old: Tensor, codes: Tensor, filler: float) -> Tensor:
        new = torch.cat([old[: self.offset], codes.to(old.dtype), old[self.end :]])
        return torch.cat([new, new.new_full((self.rows(len(old)) - len(new), *old.shape[1:]), filler)])


@dataclass(frozen=True, eq=False)
class JointVocabulary:
    """The codes of several codebooks one after another in one vocabulary, as in a head over all quantizer stages.

    Attributes:
        parts: One for each codebook, with its offset among the old ids; the first has the padding.
    """

    parts: tuple[Vocabulary, ...]

    @staticmethod
    def of(vocabularies: Sequence[Vocabulary]) -> JointVocabulary:
        """Join vocabularies, in the order of the quantizer stages, from the offset of the first on."""
        offset, parts = vocabularies[0].offset, list[Vocabulary]()
        for one in vocabularies:
            parts.append(replace(one, offset=offset, multiple=1 if parts else one.multiple))
            offset += one.codes.old_size
        return JointVocabulary(tuple(parts))

    @property
    def end(self) -> int:
        """The id after the last old code."""
        return self.parts[-1].end

    def rows(self, before: int) -> int:
        """As `Vocabulary.rows`."""
        for one in reversed(self.parts):  # the last first, so that the offsets before it stay valid
            before = one.rows(before)
        return before

    def new_id(self, old: int) -> int:
        """As `Vocabulary.new_id`."""
        for one in reversed(self.parts):
            old = one.new_id(old)
        return old

    def counts(self, rows: int) -> Counts:
        """As `Vocabulary.counts`; an id that moves with several surgeries is counted once."""
        old = range(self.parts[0].offset, self.end)
        changed = sum(self.new_id(i) != i for i in old)
        shifted = rows - self.end if self.rows(rows) != rows else 0
        each = [one.counts(one.end) for one in self.parts]
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


AnyVocabulary = Vocabulary | JointVocabulary
