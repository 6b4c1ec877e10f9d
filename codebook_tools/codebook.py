"""The contract: a codebook and the latents it serves go in, a surgery comes out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:  # names and shapes of a checkpoint are told without torch, which takes seconds to import
    from torch import Tensor

REMOVED = -1
"""The new code of an old code that lost its identity."""


class Lookup(Enum):
    """How a family finds the nearest code of a latent."""

    EUCLIDEAN = "euclidean"
    COSINE = "cosine"
    DOT = "dot"


class Emit(Enum):
    """What the decoder gets of a code: the row as stored, or the row at unit length."""

    RAW = "raw"
    UNIT = "unit"


@dataclass(frozen=True, eq=False)
class Codebook:
    """The effective codes, as the decoder sees them.

    vectors: (size, dim) float32, finite.
    """

    vectors: Tensor
    lookup: Lookup = Lookup.EUCLIDEAN
    emit: Emit = Emit.RAW

    def __post_init__(self) -> None:
        import torch

        assert self.vectors.ndim == 2 and self.vectors.dtype == torch.float32, self.vectors.shape

    @property
    def size(self) -> int:
        return self.vectors.shape[0]

    @property
    def dim(self) -> int:
        return self.vectors.shape[1]


@dataclass(frozen=True, eq=False)
class Surgery:
    """A new codebook, and what became of the old codes.

    index_map: (old_size,) int64, the new code where the old one kept its identity or was merged, else REMOVED.
    bits: that an entry needs, where the rows were rounded to a grid; None: as many as its stored dtype has.
    first: a larger codebook, and what became of the old codes in it, for a fine-tuning to begin with: it merges them
    into as many as `codebook` has on the way.
    """

    codebook: Codebook
    index_map: Tensor
    bits: int | None = None
    first: Surgery | None = None

    def __post_init__(self) -> None:
        import torch

        assert self.first is None or self.first.codebook.size > self.codebook.size
        assert self.index_map.ndim == 1 and self.index_map.dtype == torch.int64
        assert bool(((self.index_map >= REMOVED) & (self.index_map < self.codebook.size)).all())


@runtime_checkable
class Latents(Protocol):
    """Encoder outputs before quantisation, in batches that can be read again from the start.

    Each batch is (n, dim) float32. They need not fit in memory together.
    """

    def __iter__(self) -> Iterator[Tensor]: ...


class Strategy(Protocol):
    """A frozen, callable dataclass whose fields are its settings.

    It leaves its inputs as they are and draws randomness from its own seed only: the same inputs give the same bytes.
    counts: (codebook.size,) int64, assignments per code over all of the calibration data.

    A class may say more in class attributes:
        needs: "counts" where it does without latents, "codebook" where it does without counts, too (then they may all
            be 0). It can be run on a model whose network nobody has.
        exact: True for all latents, however many there are; others get a sample of a million, in an order whose heads
            are samples.
        summary, example: A sentence and a line for `--help`: the strategy is then a command. Its fields that have an
            `runtime.options.Option` are options.
        trains: True where fine-tuning follows unless it is left out.
    """

    def __call__(self, codebook: Codebook, latents: Latents, counts: Tensor) -> Surgery: ...
