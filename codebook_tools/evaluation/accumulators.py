"""What one pass over data adds up, in parts: the whole is the same in whatever order the parts are added."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Self, TypeVar

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import squared_errors
from codebook_tools.codebook import Codebook
from codebook_tools.errors import NotFiniteError
from codebook_tools.runtime.devices import wide

_Number = TypeVar("_Number", int, Fraction)

LIMBS = 3
"""Numbers of float64 that a sum is carried in: each the nearest to what those before it leave."""


_OPTIONAL = ("similarity", "detail", "shown_detail")
"""Fields of Sums that some data have none of."""


@dataclass(frozen=True, eq=False)
class BookSums:
    """Of one codebook. counts: (size,) int64. error: squared distances from latents to their codes. near: latents
    within the reference distance of theirs; None where there is no such distance. moments: (2, dim + 1, dim) float64,
    sums and below them sums of products, of the latents and of the codes that they are replaced by; None where they are
    not asked for."""

    key: str
    dim: int
    counts: Tensor
    error: Fraction
    near: int | None
    moments: Tensor | None = None

    def __add__(self, other: Self) -> Self:
        return replace(
            self,
            counts=self.counts + other.counts,
            error=self.error + other.error,
            near=_both(self.near, other.near),
            moments=None if self.moments is None or other.moments is None else self.moments + other.moments,
        )


@dataclass(frozen=True, eq=False)
class Sums:
    """images: or clips. values: that were reconstructed, 0 where none was. error: of their squared errors. similarity:
    SSIM of each image; None where there is none to compute. books: in the order of the model. detail, shown_detail: of
    the images and of their reconstructions, metrics.detail; None as similarity is."""

    images: int
    values: int
    error: Fraction
    similarity: Fraction | None
    books: tuple[BookSums, ...]
    detail: Fraction | None = None
    shown_detail: Fraction | None = None

    def __add__(self, other: Self) -> Self:
        return replace(
            self,
            images=self.images + other.images,
            values=self.values + other.values,
            error=self.error + other.error,
            books=tuple(mine + its for mine, its in zip(self.books, other.books, strict=True)),
            **{name: _both(getattr(self, name), getattr(other, name)) for name in _OPTIONAL},
        )

    def packed(self) -> tuple[Tensor, Tensor]:
        """All numbers, as int64 and as float64, flat: packed sums of one model add up as the sums themselves do."""
        optional = [getattr(self, name) for name in _OPTIONAL]
        integers = [self.images, self.values, *(int(of is None) for of in optional)]
        for book in self.books:
            integers += [book.near or 0, int(book.near is None), int(book.moments is None)]
        fractions = [self.error, *(of or Fraction(0) for of in optional), *(book.error for book in self.books)]
        counts = [book.counts for book in self.books]
        moments = [book.moments.flatten() for book in self.books if book.moments is not None]
        return torch.cat([torch.tensor(integers), *counts]), torch.cat([*map(limbs, fractions), *moments])

    def unpacked(self, integers: Tensor, floats: Tensor) -> Self:
        """The sums that `packed` made these of; self: any of the same model. Raises ValueError where they are not."""
        sizes = [len(book.counts) for book in self.books]
        first = 2 + len(_OPTIONAL)
        numbers = first + 3 * len(sizes)
        if len(integers) != numbers + sum(sizes):
            raise ValueError(f"{len(integers)} numbers in place of {numbers + sum(sizes)}, as older versions wrote")
        images, values, *lacking = integers[:first].tolist()
        nears, lacks_near, lacks_moments = integers[first:numbers].reshape(-1, 3).T.tolist()
        counts = torch.split(integers[numbers:], sizes)
        fractional = LIMBS * (1 + len(_OPTIONAL) + len(sizes))
        error, *fractions = map(from_limbs, torch.split(floats[:fractional], LIMBS))
        shapes = [
            (0,) if no else (2, book.dim + 1, book.dim) for book, no in zip(self.books, lacks_moments, strict=True)
        ]
        moments = torch.split(floats[fractional:], list(map(math.prod, shapes)))
        optional, errors = fractions[: len(_OPTIONAL)], fractions[len(_OPTIONAL) :]
        found = [
            replace(
                book,
                counts=counts[i],
                error=errors[i],
                near=None if lacks_near[i] else nears[i],
                moments=None if lacks_moments[i] else moments[i].reshape(shapes[i]),
            )
            for i, book in enumerate(self.books)
        ]
        return replace(
            self,
            images=images,
            values=values,
            error=error,
            books=tuple(found),
            **{name: None if lacks else of for name, of, lacks in zip(_OPTIONAL, optional, lacking, strict=True)},
        )


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


def no_sums(key: str, codebook: Codebook, reference: float | None = None, *, moments: bool = False) -> BookSums:
    """Of no latents yet."""
    rows, codes = torch.empty(0, codebook.dim), torch.empty(0, dtype=torch.int64)
    return book_sums(key, codebook, reference, rows, codes, moments=moments)


def _moments(rows: Tensor, codebook: Codebook, counts: Tensor) -> Tensor:
    """(2, dim + 1, dim), as `BookSums` has them: in float64, where the order of the parts changes last digits alone."""
    rows, codes = wide(codebook.metric.emit(rows)), codebook.emitted.cpu().double()
    of_rows = torch.cat([rows.sum(0, keepdim=True), rows.T @ rows]).cpu()
    weighted = codes * counts[:, None]
    return torch.stack([of_rows, torch.cat([weighted.sum(0, keepdim=True), weighted.T @ codes])])


def _both(a: _Number | None, b: _Number | None) -> _Number | None:
    """What one part lacks, the whole lacks."""
    return None if a is None or b is None else a + b


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
