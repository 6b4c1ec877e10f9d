"""What one pass over data adds up. Sums are exact, so the order of batches and parts does not change them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Self

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import squared_errors
from codebook_tools.codebook import Codebook
from codebook_tools.data.sampling import Sampler
from codebook_tools.evaluation import metrics
from codebook_tools.evaluation.exact import LIMBS, exact, from_limbs, limbs
from codebook_tools.evaluation.ids import Distinct
from codebook_tools.evaluation.one_pass import Accumulator, Batch
from codebook_tools.evaluation.quoted.tally import Tally
from codebook_tools.runtime import distributed
from codebook_tools.runtime.devices import wide

_SCORES: Mapping[str, tuple[str, Callable[[Tensor, Tensor], Tensor | None]]] = {
    "similarity": ("ssim", metrics.ssim),
    "detail": ("sharpness", lambda media, reconstructions: metrics.detail(media)),
    "reconstructed_detail": ("sharpness", lambda media, reconstructions: metrics.detail(reconstructions)),
    "total": ("nmse", lambda media, reconstructions: total_of(media)),
    "squares": ("nmse", lambda media, reconstructions: total_of(media.square())),
}
"""Optional fields of Sums: the figure that needs it, and what is added up of media and reconstructions.

None where it is undefined for them."""


@dataclass(frozen=True, eq=False)
class BookSums:
    """Sums of one codebook.

    Attributes:
        key: Name of the codebook in the checkpoint.
        dim: Dimensions of a code.
        counts: (size,) int64, assignments per code.
        error: Sum of squared distances from latents to their codes.
        near: Latents within the reference distance of their code; None without a reference distance.
        moments: (2, dim + 1, dim) float64: for the latents and for the codes that replace them, the sum in the first
            row and the sum of outer products below; None where they are not computed.
    """

    key: str
    dim: int
    counts: Tensor
    error: Fraction
    near: int | None
    moments: Tensor | None = None

    @property
    def latents(self) -> int:
        """Number of latents."""
        return int(self.counts.sum())

    def __add__(self, other: Self) -> Self:
        return replace(self, **_added(self, other, ("counts", "error", "near", "moments")))


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums of a pass.

    Attributes:
        images: Number of images, or of clips.
        values: Number of reconstructed values; 0 without reconstructions.
        error: Sum of their squared errors.
        similarity: Sum of the SSIM of images; None where it is not computed, or is undefined for an image.
        books: Sums of each codebook, in the order of the model.
        detail: Sum of metrics.detail of the images; None as similarity.
        reconstructed_detail: Sum of metrics.detail of the reconstructions; None as similarity.
        total: Sum of the values of the items; None where it is not computed.
        squares: Sum of their squares; None as total.
        ids: The ids of the items; None of one quantizer stage. Not packed.
        quoted: Sums of the figures of --metrics by name. Not packed.
        rate: Latents that meet the first codebook in a second of sound; None of other data. A constant of the model.
    """

    images: int
    values: int
    error: Fraction
    similarity: Fraction | None
    books: tuple[BookSums, ...]
    detail: Fraction | None = None
    reconstructed_detail: Fraction | None = None
    total: Fraction | None = None
    squares: Fraction | None = None
    ids: Distinct | None = None
    quoted: Mapping[str, Tally] = field(default_factory=dict)
    rate: Fraction | None = None

    def __add__(self, other: Self) -> Self:
        books = tuple(one + more for one, more in zip(self.books, other.books, strict=True))
        quoted = {name: tally + other.quoted[name] for name, tally in self.quoted.items() if name in other.quoted}
        added = _added(self, other, ("images", "values", "error", "ids", *_SCORES))
        return replace(self, books=books, quoted=quoted, **added)

    def packed(self) -> tuple[Tensor, Tensor]:
        """All numbers as two flat tensors, int64 and float64. Adding the tensors of one model adds the sums."""
        optional = [getattr(self, name) for name in _SCORES]
        flags = [flag for book in self.books for flag in (book.near or 0, book.near is None, book.moments is None)]
        integers = torch.tensor([self.images, self.values, *(total is None for total in optional), *flags])
        fractions = [self.error, *(total or Fraction(0) for total in optional), *(book.error for book in self.books)]
        moments = [book.moments.flatten() for book in self.books if book.moments is not None]
        counts = [book.counts for book in self.books]
        return torch.cat([integers, *counts]), torch.cat([*map(limbs, fractions), *moments])

    def unpacked(self, integers: Tensor, floats: Tensor) -> Self:
        """The inverse of `packed`, called on any sums of the same model.

        Args:
            integers: (n,) int64.
            floats: (m,) float64.

        Raises:
            ValueError: The tensors have other lengths than those of this model.
        """
        sizes = [len(book.counts) for book in self.books]
        lengths = [2 + len(_SCORES), 3 * len(sizes), *sizes]
        if len(integers) != sum(lengths):
            raise ValueError(f"{len(integers)} numbers in place of {sum(lengths)}, as older versions wrote")
        first, flags, *counts = torch.split(integers, lengths)
        images, values, *lacking = first.tolist()
        near, no_near, no_moments = flags.reshape(-1, 3).T.tolist()
        shapes = [(0,) if no else (2, book.dim + 1, book.dim) for book, no in zip(self.books, no_moments, strict=True)]
        fractions = 1 + len(_SCORES) + len(sizes)
        parts = torch.split(floats, [*[LIMBS] * fractions, *map(math.prod, shapes)])
        error, *totals = map(from_limbs, parts[:fractions])
        books = [
            replace(
                book,
                counts=counts[i],
                error=totals[len(_SCORES) + i],
                near=None if no_near[i] else near[i],
                moments=None if no_moments[i] else parts[fractions + i].reshape(shapes[i]),
            )
            for i, book in enumerate(self.books)
        ]
        optional: dict[str, Any] = {
            name: None if no else of for name, of, no in zip(_SCORES, totals, lacking, strict=False)
        }
        return replace(self, images=images, values=values, error=error, books=tuple(books), **optional)


def _added(one: BookSums | Sums, other: BookSums | Sums, names: Iterable[str]) -> dict[str, Any]:
    """Sums of the named fields; None if either operand is None."""
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in names}
    return {name: None if a is None or b is None else a + b for name, (a, b) in pairs.items()}


class Totals(Accumulator):
    """The exact sums of a pass.

    Attributes:
        sums: Of all batches so far.
    """

    def __init__(self, books: Books, *, measured: bool = False, figures: Collection[str] = ()) -> None:
        """
        Args:
            books: Key and codebook of each, and the squared distance up to which a latent counts as covered.
            measured: Whether moments and errors of reconstructions are added up.
            figures: Those of a modality for which more is added up: ssim, sharpness, nmse.
        """
        self._books, self._measured = books, measured
        self._scores = {name: score for name, (figure, score) in _SCORES.items() if figure in figures}
        latents = [torch.empty(0, codebook.dim) for _, codebook, _ in books]
        self.sums = self._of(Batch([], latents, [torch.empty(0, dtype=torch.int64)] * len(books)))

    def add(self, batch: Batch) -> None:
        """Add the sums of a batch."""
        self.sums += self._of(batch)

    def _of(self, batch: Batch) -> Sums:
        values, error = 0, Fraction(0)
        optional: dict[str, Fraction | None] = dict.fromkeys(self._scores, Fraction(0))
        if self._measured and batch.media:
            media, reconstructed = batch.media
            media = media.to(reconstructed.device)
            values, error = media.numel(), exact(float(wide(reconstructed - media).square().sum()))
            optional = {name: _total(score(media, reconstructed)) for name, score in self._scores.items()}
        of_books = tuple(
            book_sums(*book, latents, codes, moments=self._measured)
            for book, latents, codes in zip(self._books, batch.latents, batch.codes, strict=True)
        )
        all_of: dict[str, Any] = dict.fromkeys(_SCORES) | optional
        return Sums(images=len(batch.items), values=values, error=error, books=of_books, **all_of)

    def merge(self) -> None:
        """All-reduce the sums."""
        self.sums = self.sums.unpacked(*map(distributed.summed, self.sums.packed()))


Books = Sequence[tuple[str, Codebook, float | None]]
"""Of each codebook its key, its codes, and the squared reference distance, if any."""


class Usage(Accumulator):
    """Usage of one codebook.

    Attributes:
        counts: (size,) int64, assignments per code.
        error: () float64, sum of squared distances from latents to their codes.
    """

    def __init__(self, codebook: Codebook, stage: int = 0) -> None:
        """stage: index of the codebook in the batches."""
        self._codebook, self._stage = codebook, stage
        self.counts = torch.zeros(codebook.size, dtype=torch.int64)
        self.error = torch.zeros((), dtype=torch.float64)

    def add(self, batch: Batch) -> None:
        """Add the counts and the squared error of a batch."""
        latents, codes = batch.latents[self._stage], batch.codes[self._stage]
        self.counts += torch.bincount(codes, minlength=len(self.counts)).cpu()
        self.error += squared_errors(latents, self._codebook, codes).sum().cpu()

    def merge(self) -> None:
        """All-reduce counts and error."""
        self.counts, self.error = distributed.summed(self.counts), distributed.summed(self.error)


class Draw(Accumulator):
    """A sample of the latents of a codebook.

    Attributes:
        sampler: Keeps the requested columns of each sampled latent.
    """

    def __init__(self, codebook: Codebook, columns: Sequence[str], seed: int, limit: int, stage: int = 0) -> None:
        """
        Args:
            codebook: The one that the latents are of.
            columns: "latents", "codes" or both.
            seed: Of the sample.
            limit: Latents in the sample at most.
            stage: Index of the codebook in the batches.
        """
        self.sampler, self._columns, self._stage = Sampler(seed, limit), columns, stage
        nothing = {"latents": torch.empty(0, codebook.dim), "codes": torch.empty(0, dtype=torch.int64)}
        self.sampler.add([], 0, *(nothing[column] for column in columns))  # so that a process without a batch can merge

    def add(self, batch: Batch) -> None:
        """Add the latents of a batch."""
        columns = [getattr(batch, column)[self._stage] for column in self._columns]
        self.sampler.add(batch.items, len(columns[0]) // len(batch.items), *columns)

    def merge(self) -> None:
        """Merge the samples of all processes."""
        self.sampler.merge()


def book_sums(
    key: str, codebook: Codebook, reference: float | None, rows: Tensor, codes: Tensor, *, moments: bool = False
) -> BookSums:
    """The sums of one codebook over some latents.

    Args:
        key: Of the codebook.
        codebook: Its codes.
        reference: Squared distance up to which a latent counts as covered.
        rows: (n, dim) latents.
        codes: (n,) int64, the nearest code of each.
        moments: Whether moments are computed.
    """
    errors = squared_errors(rows, codebook, codes)
    counts = torch.bincount(codes, minlength=codebook.size).cpu()
    return BookSums(
        key=key,
        dim=codebook.dim,
        counts=counts,
        error=exact(float(errors.sum())),
        near=None if reference is None else int((errors <= reference).sum()),
        moments=_moments(rows, codebook, counts) if moments else None,
    )


def _moments(rows: Tensor, codebook: Codebook, counts: Tensor) -> Tensor:
    """`BookSums.moments`. These float64 sums are not exact: the order of batches may change their last digits."""
    rows, codes = wide(codebook.metric.emit(rows)), codebook.emitted.cpu().double()
    of_rows = torch.cat([rows.sum(0, keepdim=True), rows.T @ rows]).cpu()
    weighted = codes * counts[:, None]
    return torch.stack([of_rows, torch.cat([weighted.sum(0, keepdim=True), weighted.T @ codes])])


def total_of(values: Tensor) -> Tensor:
    """The sum of values of any shape, () float64, without a copy of them where the device has float64."""
    return wide(values).sum() if values.device.type == "mps" else values.sum(dtype=torch.float64)


def _total(scores: Tensor | None) -> Fraction | None:
    return None if scores is None else exact(float(wide(scores).sum()))
