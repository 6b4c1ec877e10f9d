"""What is known of a model: gathered once, and the only input of the checks."""

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

AlternativeName = Literal["scale", "layout", "range", "original", "companions"]


@dataclass(frozen=True)
class Alternative:
    """An alternative explanation: something else that the codes, or the latents, may be of.

    Attributes:
        name: Which one.
        fit: Of the codes to it.
        what: The alternative, in words.
    """

    name: AlternativeName
    fit: Fit
    what: str


@dataclass(frozen=True, eq=False)
class Pair:
    """A codebook beside that of the original.

    Attributes:
        codebook: The original's.
        used: How many of its codes are in use on a few calibration items.
        latents: (n, dim) of those items by the original's encoder; None where the shapes of the latents differ.
        moved: (n, dim) of the same places by the model's encoder; None where the shapes of the latents differ.
    """

    codebook: Codebook
    used: int
    latents: Tensor | None
    moved: Tensor | None


@dataclass(frozen=True, eq=False)
class BookEvidence:
    """What is known of one codebook.

    Attributes:
        key: Of its tensor.
        codebook: The codes, on the CPU.
        counts: (size,) int64, over all calibration data.
        held_out: (size,) int64, over all test data.
        latents: (n, dim) float32, a sample of its calibration latents; each head of it is a uniform sample.
        codes: (n,) int64, the codes of that sample.
        fit: Of the codes to that sample; None where there is no k-means.
        alternatives: Alternative explanations; only where the fit is not good.
        curve: Share of the latents' variance that so many centroids leave, by their number.
        distinct: Distinct latents of the sample, at most `size`.
        left: Share of the sample's variance that the codes leave.
        left_when_cut: The same for latents that were flattened without moving the channels last; None for rows.
        companions: The tensors beside it in the file.
        filling: Whether its size was made up with dead codes on purpose.
        pair: The original's codebook; None without an original.
    """

    key: str
    codebook: Codebook
    counts: Tensor
    held_out: Tensor
    latents: Tensor
    codes: Tensor
    fit: Fit | None
    alternatives: tuple[Alternative, ...]
    curve: Mapping[int, float]
    distinct: int
    left: float
    left_when_cut: float | None
    companions: Companions
    filling: bool
    pair: Pair | None

    @property
    def dead(self) -> Tensor:
        """(size,) bool: codes without a calibration latent."""
        return self.counts == 0

    @property
    def denied(self) -> bool:
        """Whether most of the codes that are alive by the running counts are no longer in use."""
        alive, used = self.companions.alive, int((~self.dead).sum())
        return self.counted and alive is not None and used < (1 - DENIED) * alive

    @property
    def counted(self) -> bool:
        """Whether there are latents enough for a count of 0 to mean something."""
        return int(self.counts.sum()) >= FEW_HITS * self.codebook.size

    @property
    def explanation(self) -> Alternative | None:
        """Where the codes do not fit: the best of the alternatives that fit far better, if any."""
        if self.fit is None or self.fit.good:
            return None
        # Rows cut wrongly are no latents.
        others = [other for other in self.alternatives if other.name != "layout" or self.fit.strange]
        better = [other for other in others if other.fit.close and other.fit.excess < self.fit.excess / 2]
        return min(better, key=lambda other: other.fit.ratio, default=None)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of a model.

    Attributes:
        books: The codebooks in question.
        curve: As a codebook's, of items, each described by all its latents of the first codebook; empty without items.
        mse: Of reconstructions of a few calibration items; None for latents from files.
        original_mse: The original's on the same items; None without an original, or without items.
        flat_mse: Of items without any detail; None without items.
        ranges: Error over the images' variance by input range, without quantization; empty for audio.
        input_range: That the latents are of.
        command: Of this package that wrote the file, "" where another program did.
        trace: Of its training; None where none was named.
        unseen: Why nothing is known of encoder and decoder; empty where they were looked at.
    """

    books: tuple[BookEvidence, ...]
    curve: Mapping[int, float]
    mse: float | None
    original_mse: float | None
    flat_mse: float | None
    ranges: Mapping[tuple[float, float], float]
    input_range: tuple[float, float]
    command: str
    trace: Trace | None
    unseen: str = ""

    @property
    def strange(self) -> bool:
        """Whether the decoder cannot have been trained with these codes: it does far worse than no detail at all."""
        return self.worse_than_flat(STRANGE)

    def worse_than_flat(self, times: float) -> bool:
        """Whether the error is so many times that of items without detail; not where nothing was reconstructed."""
        return self.mse is not None and self.flat_mse is not None and self.mse > times * self.flat_mse

    def operated(self, book: BookEvidence) -> bool:
        """Whether anything indicates that a codebook was put into the model after its training.

        This package wrote the file, the original has another size, the decoder does not know the codes, or the running
        counts contradict how they are used. A model that collapsed in its training shows none of that.
        """
        sized = book.pair is not None and book.pair.codebook.size != book.codebook.size
        return bool(self.command) or sized or self.strange or book.denied
