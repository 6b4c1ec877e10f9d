"""The contract: a codebook and the latents it serves go in, a surgery comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:  # names and shapes of a checkpoint are listed without torch, which takes seconds to import
    from torch import Tensor

REMOVED = -1
"""The new code of an old code that lost its identity."""


METRIC_NAMES = ("euclidean", "cosine", "cosine-unit", "dot")
"""Of the metrics in clustering/metric.py."""

Engine = Literal["auto", "native", "faiss", "sklearn"]
"""A k-means of clustering/engines.py."""


def as_stored(rows: Tensor) -> Tensor:
    """The rows themselves."""
    return rows


@dataclass(frozen=True)
class Metric:
    """How the nearest code of a latent is searched, and what the decoder gets of it.

    Attributes:
        name: As `--metric` and the families say it.
        search: A word for what the search compares; metrics that differ in `emit` alone share it.
        prepare: Rows (n, dim) of latents or codes -> the rows (n, dim) that the search compares.
        emit: Codes (n, dim) -> what the decoder gets of them, (n, dim); latents -> what errors compare that with.
        is_distance: Whether the nearest code is that of the least distance, among prepared rows; else it is that of the
            largest inner product, and there is no k-means.
        by_direction: Whether prepared rows have unit length.
    """

    name: str
    search: str
    prepare: Callable[[Tensor], Tensor] = as_stored
    emit: Callable[[Tensor], Tensor] = as_stored
    is_distance: bool = True
    by_direction: bool = False

    @property
    def is_euclidean(self) -> bool:
        """Whether the search compares distances of stored rows."""
        return self.is_distance and self.prepare is as_stored

    @property
    def has_unit_rows(self) -> bool:
        """Whether codes are emitted, and therefore stored, at unit length."""
        return self.by_direction and self.emit is self.prepare

    @property
    def words(self) -> tuple[str, str]:
        """Words for messages and digests: what the search compares, and "unit" or "raw" for the emitted rows."""
        return self.search, "unit" if self.has_unit_rows else "raw"

    @property
    def minimizes_error(self) -> bool:
        """Whether the search minimizes the error: then the means of cells are their best codes."""
        return self.is_distance and self.emit is self.prepare


EUCLIDEAN = Metric("euclidean", "euclidean")


@dataclass(frozen=True, eq=False)
class Codebook:
    """The effective codes.

    Attributes:
        vectors: (size, dim) float32, finite.
        metric: How they are searched and emitted.
    """

    vectors: Tensor
    metric: Metric = EUCLIDEAN

    def __post_init__(self) -> None:
        import torch

        assert self.vectors.ndim == 2 and self.vectors.dtype == torch.float32, self.vectors.shape

    @property
    def size(self) -> int:
        """Number of codes."""
        return self.vectors.shape[0]

    @property
    def dim(self) -> int:
        """Entries of a code."""
        return self.vectors.shape[1]

    @property
    def emitted(self) -> Tensor:
        """(size, dim) float32: what the decoder gets of each code."""
        return self.metric.emit(self.vectors)


@dataclass(frozen=True, eq=False)
class Surgery:
    """A new codebook, and what became of the old codes.

    Attributes:
        codebook: The new codebook.
        index_map: (old_size,) int64, the new code where the old one kept its identity or was merged, else REMOVED.
        bits: Of an entry, where the rows were rounded to a grid; None for those of the stored dtype.
        first: A surgery with a larger codebook for a fine-tuning to start with, which merges its codes into as many as
            `codebook` has on the way.
        engine: The k-means that ran, where one did.
        engine_reason: Why that one.
        power: Of the distance to its latents, whose mean a code minimizes; a fine-tuning keeps to it. Codes are used
            more evenly by a power below 2.
    """

    codebook: Codebook
    index_map: Tensor
    bits: int | None = None
    first: Surgery | None = None
    engine: Engine | None = None
    engine_reason: str | None = None
    power: float = 2.0

    def __post_init__(self) -> None:
        import torch

        assert self.first is None or self.first.codebook.size > self.codebook.size
        assert self.index_map.ndim == 1 and self.index_map.dtype == torch.int64
        assert bool(((self.index_map >= REMOVED) & (self.index_map < self.codebook.size)).all())


@runtime_checkable
class Latents(Protocol):
    """Encoder outputs before quantization, in batches that can be read again from the start.

    Each batch is (n, dim) float32. They need not fit in memory together.
    """

    def __iter__(self) -> Iterator[Tensor]: ...


class Strategy(Protocol):
    """A frozen, callable dataclass whose fields are its settings.

    It does not change its inputs and draws randomness from its own seed only: the same inputs give the same bytes.

    All attributes of the class are optional.

    Attributes:
        needs: "counts" where it needs no latents, "codebook" where it needs no counts, either (then they may all be 0).
            It can be run on a model without its network.
        exact: True to get all latents; others get a sample of a million, in an order whose heads are samples.
        summary: A sentence for `--help`: the strategy is then a command, and its fields that have an
            `runtime.options.Option` are options.
        example: A line to type, for `--help`.
        trains: True where fine-tuning follows by default.
        keeps: True where each new code is an old one, unchanged: `verify` holds the file to that.
        clusters: True where k-means on the latents places the codes: for `diagnose`, which looks for its absence.
    """

    def __call__(self, codebook: Codebook, latents: Latents, counts: Tensor) -> Surgery:
        """Make a surgery. counts: (codebook.size,) int64, assignments per code over all of the calibration data."""
