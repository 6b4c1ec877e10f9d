"""What one pass over data adds up, in parts: the whole is the same in whatever order the parts are added."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Self

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import squared_errors
from codebook_tools.codebook import Codebook
from codebook_tools.data.sampling import Sampler
from codebook_tools.errors import NotFiniteError
from codebook_tools.evaluation import metrics
from codebook_tools.evaluation.one_pass import Accumulator, Batch
from codebook_tools.runtime import distributed
from codebook_tools.runtime.devices import wide

LIMBS = 3
"""Numbers of float64 that a sum is carried in: each the nearest to what those before it leave."""

_STRUCTURE: Mapping[str, Callable[[Tensor, Tensor], Tensor | None]] = {
    "similarity": metrics.ssim,
    "detail": lambda images, reconstructions: metrics.detail(images),
    "shown_detail": lambda images, reconstructions: metrics.detail(reconstructions),
}
"""Fields of Sums that some data have none of: a score of each image, by the images and their reconstructions."""


@dataclass(frozen=True, eq=False)
class BookSums:
    """Of one codebook.

    Attributes:
        counts: (size,) int64.
        error: Squared distances from latents to their codes.
        near: Latents within the reference distance of theirs; None where there is no such distance.
        moments: (2, dim + 1, dim) float64, sums and below them sums of products, of the latents and of the codes that
            they are replaced by; None where they are not asked for.
    """

    key: str
    dim: int
    counts: Tensor
    error: Fraction
    near: int | None
    moments: Tensor | None = None

    @property
    def latents(self) -> int:
        """How many were assigned."""
        return int(self.counts.sum())

    def __add__(self, other: Self) -> Self:
        return replace(self, **_added(self, other, ("counts", "error", "near", "moments")))


@dataclass(frozen=True, eq=False)
class Sums:
    """Of all that a pass saw.

    Attributes:
        images: Or clips.
        values: That were reconstructed, 0 where none was.
        error: Of their squared errors.
        similarity: SSIM of each image; None where there is none to compute.
        books: In the order of the model.
        detail, shown_detail: Of the images and of their reconstructions, metrics.detail; None as similarity is.
    """

    images: int
    values: int
    error: Fraction
    similarity: Fraction | None
    books: tuple[BookSums, ...]
    detail: Fraction | None = None
    shown_detail: Fraction | None = None

    def __add__(self, other: Self) -> Self:
        books = tuple(one + more for one, more in zip(self.books, other.books, strict=True))
        return replace(self, books=books, **_added(self, other, ("images", "values", "error", *_STRUCTURE)))

    def packed(self) -> tuple[Tensor, Tensor]:
        """All numbers, as int64 and as float64, flat: packed sums of one model add up as the sums themselves do."""
        optional = [getattr(self, name) for name in _STRUCTURE]
        flags = [flag for book in self.books for flag in (book.near or 0, book.near is None, book.moments is None)]
        integers = torch.tensor([self.images, self.values, *(total is None for total in optional), *flags])
        fractions = [self.error, *(total or Fraction(0) for total in optional), *(book.error for book in self.books)]
        moments = [book.moments.flatten() for book in self.books if book.moments is not None]
        counts = [book.counts for book in self.books]
        return torch.cat([integers, *counts]), torch.cat([*map(limbs, fractions), *moments])

    def unpacked(self, integers: Tensor, floats: Tensor) -> Self:
        """The sums that `packed` made these of; self: any of the same model. Raises ValueError where they are not."""
        sizes = [len(book.counts) for book in self.books]
        lengths = [2 + len(_STRUCTURE), 3 * len(sizes), *sizes]
        if len(integers) != sum(lengths):
            raise ValueError(f"{len(integers)} numbers in place of {sum(lengths)}, as older versions wrote")
        first, flags, *counts = torch.split(integers, lengths)
        images, values, *lacking = first.tolist()
        near, no_near, no_moments = flags.reshape(-1, 3).T.tolist()
        shapes = [(0,) if no else (2, book.dim + 1, book.dim) for book, no in zip(self.books, no_moments, strict=True)]
        fractions = 1 + len(_STRUCTURE) + len(sizes)
        parts = torch.split(floats, [*[LIMBS] * fractions, *map(math.prod, shapes)])
        error, *totals = map(from_limbs, parts[:fractions])
        books = [
            replace(
                book,
                counts=counts[i],
                error=totals[len(_STRUCTURE) + i],
                near=None if no_near[i] else near[i],
                moments=None if no_moments[i] else parts[fractions + i].reshape(shapes[i]),
            )
            for i, book in enumerate(self.books)
        ]
        optional = {name: None if no else of for name, of, no in zip(_STRUCTURE, totals, lacking, strict=False)}
        return replace(self, images=images, values=values, error=error, books=tuple(books), **optional)


def _added(one: BookSums | Sums, other: BookSums | Sums, names: Iterable[str]) -> dict[str, Any]:
    """Of the fields; None where either operand is None."""
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in names}
    return {name: None if a is None or b is None else a + b for name, (a, b) in pairs.items()}


class Totals(Accumulator):
    """The exact sums of a pass.

    Attributes:
        sums: What was added so far.
    """

    def __init__(self, books: Books, *, measured: bool = False, structure: bool = False) -> None:
        """
        Args:
            books: Key and codebook of each, and the squared distance up to which a latent counts as covered.
            measured: Whether moments and the errors of reconstructions are added up, too.
            structure: Whether similarity and detail of images are.
        """
        self._books, self._measured, self._structure = books, measured, structure
        latents = [torch.empty(0, codebook.dim) for _, codebook, _ in books]
        self.sums = self._of(Batch([], latents, [torch.empty(0, dtype=torch.int64)] * len(books)))

    def add(self, batch: Batch) -> None:
        self.sums += self._of(batch)

    def _of(self, batch: Batch) -> Sums:
        values, error, optional = 0, Fraction(0), dict.fromkeys(_STRUCTURE, Fraction(0) if self._structure else None)
        if self._measured and batch.media:
            media, reconstructed = batch.media
            media = media.to(reconstructed.device)
            values, error = media.numel(), exact(float(wide(reconstructed - media).square().sum()))
            if self._structure:
                optional = {name: _total(score(media, reconstructed)) for name, score in _STRUCTURE.items()}
        of_books = tuple(
            book_sums(*book, latents, codes, moments=self._measured)
            for book, latents, codes in zip(self._books, batch.latents, batch.codes, strict=True)
        )
        return Sums(images=len(batch.items), values=values, error=error, books=of_books, **optional)

    def merge(self) -> None:
        self.sums = self.sums.unpacked(*map(distributed.summed, self.sums.packed()))


Books = Sequence[tuple[str, Codebook, float | None]]


class Usage(Accumulator):
    """How one codebook is used.

    Attributes:
        counts: (size,) int64, hits of each code.
        error: () float64, sum of squared distances from latents to their codes.
    """

    def __init__(self, codebook: Codebook, stage: int = 0) -> None:
        self._codebook, self._stage = codebook, stage
        self.counts = torch.zeros(codebook.size, dtype=torch.int64)
        self.error = torch.zeros((), dtype=torch.float64)

    def add(self, batch: Batch) -> None:
        latents, codes = batch.latents[self._stage], batch.codes[self._stage]
        self.counts += torch.bincount(codes, minlength=len(self.counts)).cpu()
        self.error += squared_errors(latents, self._codebook, codes).sum().cpu()

    def merge(self) -> None:
        self.counts, self.error = distributed.summed(self.counts), distributed.summed(self.error)


class Draw(Accumulator):
    """A sample of the latents of a codebook: those whose hashes are the smallest.

    Attributes:
        sampler: Holds it: of each latent the columns that were asked for.
    """

    def __init__(self, codebook: Codebook, columns: Sequence[str], seed: int, limit: int, stage: int = 0) -> None:
        """columns: "latents", "codes" or both. limit: how many latents are kept."""
        self.sampler, self._columns, self._stage = Sampler(seed, limit), columns, stage
        nothing = {"latents": torch.empty(0, codebook.dim), "codes": torch.empty(0, dtype=torch.int64)}
        self.sampler.add([], 0, *(nothing[column] for column in columns))  # a part may have no batch

    def add(self, batch: Batch) -> None:
        columns = [getattr(batch, column)[self._stage] for column in self._columns]
        self.sampler.add(batch.items, len(columns[0]) // len(batch.items), *columns)

    def merge(self) -> None:
        self.sampler.merge()


def book_sums(
    key: str, codebook: Codebook, reference: float | None, rows: Tensor, codes: Tensor, *, moments: bool = False
) -> BookSums:
    """Of latents, (n, dim), and their codes, (n,). reference: the squared distance up to which they are covered."""
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
    """(2, dim + 1, dim), as `BookSums` has them: in float64, where the order of the parts changes last digits alone."""
    rows, codes = wide(codebook.metric.emit(rows)), codebook.emitted.cpu().double()
    of_rows = torch.cat([rows.sum(0, keepdim=True), rows.T @ rows]).cpu()
    weighted = codes * counts[:, None]
    return torch.stack([of_rows, torch.cat([weighted.sum(0, keepdim=True), weighted.T @ codes])])


def _total(scores: Tensor | None) -> Fraction | None:
    return None if scores is None else exact(float(wide(scores).sum()))


def exact(value: float) -> Fraction:
    """The number that a float is: fractions add up without rounding. Raises NotFiniteError where it is none."""
    if not math.isfinite(value):
        raise NotFiniteError(f"squared errors add up to {value}: latents or codes are too large for float32")
    return Fraction(value)


def limbs(total: Fraction) -> Tensor:
    """(LIMBS,) float64 that add up to it: to 159 bits, which is all of it for sums of any length."""
    found = list[float]()
    for _ in range(LIMBS):
        found.append(float(total))
        total -= Fraction(found[-1])
    return torch.tensor(found, dtype=torch.float64)


def from_limbs(values: Tensor) -> Fraction:
    """The sum of floats, (n,), without rounding."""
    return sum(map(exact, values.tolist()), Fraction(0))
