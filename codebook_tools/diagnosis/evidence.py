"""What is known of a model before anything is judged: gathered once, and all that the checks look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from codebook_tools.codebook import Codebook
from codebook_tools.diagnosis.fit import Fit
from codebook_tools.diagnosis.stored_ema import Companions
from codebook_tools.diagnosis.training_trace import Trace

FEW_HITS = 10
"""Latents a code, below which a code without any may be chance."""

STRANGE = 1.5
"""Of the error of items without detail, which a model with a single code in use may have."""

DENIED = 0.5
"""Share of the codes that are alive by the running counts and have no latent: other data alone make less of it."""

RivalName = Literal["scale", "layout", "range", "original", "companions"]


@dataclass(frozen=True)
class Rival:
    """Something else that the codes, or the latents, might be of. fit: of the codes there. what: it, in words."""

    name: RivalName
    fit: Fit
    what: str


@dataclass(frozen=True, eq=False)
class Pair:
    """A book beside that of the original. codebook, used: its codes, and how many of them are in use on a few
    calibration items. latents: (n, dim) of those items by the original's encoder, and `moved` by the model's, row by
    row, where both have the same places; of other shapes, None."""

    codebook: Codebook
    used: int
    latents: Tensor | None
    moved: Tensor | None


@dataclass(frozen=True, eq=False)
class BookEvidence:
    """One codebook. counts, held_out: (size,) int64, over all calibration and all test data. latents: (n, dim) float32,
    a sample of the calibration latents that meet it, in an order in which each head is a uniform sample; codes: (n,)
    int64, their own. fit: on that sample; None where there is no k-means. rivals: looked for only where the fit is not
    good. curve: share of the latents' variance that is left by so many centroids. distinct: latents of the sample that
    differ, at most `size`. left: share of the sample's variance that the codes leave, left_when_cut: of that of latents
    whose channels were not moved last. companions: what lies beside it in the file. filling: whether its size was made
    up with dead codes on purpose. pair: of the original, where there is one.
    """

    key: str
    codebook: Codebook
    counts: Tensor
    held_out: Tensor
    latents: Tensor
    codes: Tensor
    fit: Fit | None
    rivals: tuple[Rival, ...]
    curve: Mapping[int, float]
    distinct: int
    left: float
    left_when_cut: float
    companions: Companions
    filling: bool
    pair: Pair | None

    @property
    def dead(self) -> Tensor:
        """(size,) bool: without a hit on the calibration data."""
        return self.counts == 0

    @property
    def denied(self) -> bool:
        """Whether most of the codes that the running counts call alive are in use no more."""
        alive, used = self.companions.alive, int((~self.dead).sum())
        return self.counted and alive is not None and used < (1 - DENIED) * alive

    @property
    def counted(self) -> bool:
        """Whether there are latents enough for a code without any to mean something."""
        return int(self.counts.sum()) >= FEW_HITS * self.codebook.size

    @property
    def explanation(self) -> Rival | None:
        """Where the codes do not fit: of what fits far better, the best."""
        if self.fit is None or self.fit.good:
            return None
        rivals = [r for r in self.rivals if r.name != "layout" or self.fit.strange]  # rows cut wrongly are no latents
        better = [r for r in rivals if r.fit.close and r.fit.excess < self.fit.excess / 2]
        return min(better, key=lambda rival: rival.fit.ratio, default=None)


@dataclass(frozen=True, eq=False)
class Evidence:
    """books: those that are asked about. curve: as a book's, of items, each told by all of its latents that meet the
    first book. mse: of reconstructions on a few calibration items; original_mse: of the original's; flat_mse: of items
    without any detail. ranges: that error over the images' variance, by input range, when nothing is quantised; empty
    for sound. input_range: that the latents are of. command: of this package that wrote the file, "" where another did.
    trace: of its training.
    """

    books: tuple[BookEvidence, ...]
    curve: Mapping[int, float]
    mse: float
    original_mse: float | None
    flat_mse: float
    ranges: Mapping[tuple[float, float], float]
    input_range: tuple[float, float]
    command: str
    trace: Trace | None

    @property
    def strange(self) -> bool:
        """Whether the decoder cannot have been trained with these codes: it does far worse than no detail at all."""
        return self.mse > STRANGE * self.flat_mse

    def operated(self, book: BookEvidence) -> bool:
        """Whether anything shows that a codebook was put into a model after its training: this package wrote the file,
        the original has another size, the decoder does not know the codes, or the running counts deny how they are
        used. A model that collapsed in its training shows none of that."""
        sized = book.pair is not None and book.pair.codebook.size != book.codebook.size
        return bool(self.command) or sized or self.strange or book.denied
