"""One pass of a model over data: which codes stand at which positions, how often each, and for which latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import starmap

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import squared_errors
from codebook_tools.data.dataset import Media
from codebook_tools.data.items import Item
from codebook_tools.data.latents import rows_of
from codebook_tools.data.sampling import SAMPLE_LIMIT, Sample, Sampler
from codebook_tools.evaluation.accumulators import Sums, book_sums, no_sums
from codebook_tools.models.model import Model
from codebook_tools.runtime import distributed
from codebook_tools.runtime.progress import Watch


@dataclass(frozen=True, eq=False)
class Tokens:
    """Of one book, over all of the data. counts: (size,) int64, or float where they stand for a sample. error: sum of
    squared distances from latents to their codes. sample: (n,) int64, the codes of the latents that a Sampler of the
    seed draws, in its order."""

    counts: Tensor
    error: float
    sample: Tensor


def tokenise(model: Model, images: Media, *, seed: int, batch: int, watch: Watch) -> tuple[Tokens, ...]:
    """The tokens of each of the model's books; of parts, those of all processes together. Raises CodebookError where no
    item can be read."""
    books = [book.codebook for book in model.books]
    counts = [torch.zeros(book.size, dtype=torch.int64) for book in books]
    errors = torch.zeros(len(books), dtype=torch.float64)
    samplers = [Sampler(seed, SAMPLE_LIMIT) for _ in books]
    for sampler in samplers:
        sampler.add([], 0, torch.empty(0, dtype=torch.int64))  # a part may have no batch
    parts = images.part[1]
    for items, seen in _batches(model, images, batch, watch):
        for i, (rows, codes) in enumerate(seen):
            counts[i] += torch.bincount(codes, minlength=books[i].size).cpu()
            errors[i] += squared_errors(rows, books[i], codes).sum().cpu()
            samplers[i].add(items, len(codes) // len(items), codes)
    if parts > 1:
        counts, errors = [distributed.summed(of) for of in counts], distributed.summed(errors)
    samples = [sampler.columns(parts)[0] for sampler in samplers]
    return tuple(map(Tokens, counts, errors.tolist(), samples))


def counted(
    model: Model, images: Media, *, seed: int, limit: int, batch: int, watch: Watch
) -> tuple[Sums, tuple[Sample, ...]]:
    """How often each code stands in the parts of `images` that the processes see, and of each book's latents a sample:
    the `limit` whose hashes are the smallest."""
    books = [(book.key, book.codebook, None) for book in model.books]
    samplers = [Sampler(seed, limit) for _ in books]
    for sampler, (_, codebook, _) in zip(samplers, books, strict=True):
        sampler.add([], 0, torch.empty(0, codebook.dim))
    total, parts = Sums(0, 0, Fraction(0), None, tuple(starmap(no_sums, books))), images.part[1]
    for items, seen in _batches(model, images, batch, watch):
        for sampler, (rows, _) in zip(samplers, seen, strict=True):
            sampler.add(items, len(rows) // len(items), rows)
        of_books = tuple(book_sums(*book, rows, codes) for book, (rows, codes) in zip(books, seen, strict=True))
        total += Sums(len(items), 0, Fraction(0), None, of_books)
    if parts > 1:
        total = total.unpacked(*map(distributed.summed, total.packed()))
    return total, tuple(sampler.sample(parts) for sampler in samplers)


def _batches(
    model: Model, images: Media, batch: int, watch: Watch
) -> Iterator[tuple[Sequence[Item], list[tuple[Tensor, Tensor]]]]:
    """Items that were seen, and of each book their latents (n, dim) and codes (n,)."""
    done = 0
    for items, media in images.batches(batch):
        with torch.no_grad():
            seen = model.pass_through(media)
        yield items, list(zip(map(rows_of, seen.latents), map(torch.flatten, seen.codes), strict=True))
        done += len(items) * images.part[1]
        watch.progress("tokens", min(done, len(images)), len(images))
