"""What one pass tells of codebooks: how often each code is chosen, and for which latents."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from codebook_tools.codebook import Codebook
from codebook_tools.data.dataset import Media
from codebook_tools.data.latents import ItemLatents, StoredLatents
from codebook_tools.data.sampling import SAMPLE_LIMIT, Sample
from codebook_tools.evaluation.accumulators import Draw, Sums, Totals, Usage
from codebook_tools.evaluation.one_pass import LatentSource, MediaSource, run_pass
from codebook_tools.models.model import Model
from codebook_tools.runtime.progress import Watch


@dataclass(frozen=True, eq=False)
class Survey:
    """What one pass over the calibration latents found.

    counts: (size,) int64. total: latents seen. sample: (n, dim) float32, ordered by hash, so that every head of it is a
    uniform sample; all latents when total <= SAMPLE_LIMIT. codes: (n,) int64, of the sample. error: sum of squared
    errors, over all latents.
    """

    counts: Tensor
    total: int
    sample: StoredLatents
    codes: Tensor
    error: float

    @property
    def sampled(self) -> bool:
        return len(self.sample) < self.total

    def remarks(self, exact: bool) -> list[str]:
        """What to warn of where not all latents are looked at. exact: whether k-means goes over all the same."""
        if not self.sampled:
            return []
        what = "index maps see" if exact else "k-means and index maps see"
        return [f"{what} a sample of {len(self.sample):,} of {self.total:,} latents"]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Codes of one codebook, over all of the data.

    Attributes:
        counts: (size,) int64, or float where they stand for a sample.
        sample: (n,) int64, the codes of the latents that a Sampler of the seed draws, in its order.
    """

    counts: Tensor
    sample: Tensor


def survey(latents: ItemLatents, codebook: Codebook, *, seed: int, limit: int = SAMPLE_LIMIT, watch: Watch) -> Survey:
    """Encode, count and sample in one pass; of parts, what all processes found together.

    Raises:
        CodebookError: No item can be read.
    """
    usage, draw = Usage(codebook), Draw(codebook, ("latents", "codes"), seed, limit)
    run_pass(LatentSource(latents, codebook), [usage, draw], watch)
    rows, codes = draw.sampler.columns()
    return Survey(usage.counts, int(usage.counts.sum()), StoredLatents(rows), codes, float(usage.error))


def tokenize(model: Model, images: Media, *, seed: int, batch: int, watch: Watch) -> tuple[Tokens, ...]:
    """The tokens of each of the model's codebooks; of parts, those of all processes together.

    Raises:
        CodebookError: No item can be read.
    """
    books = [(book.codebook, stage) for stage, book in enumerate(model.books)]
    counts = [Usage(book, stage) for book, stage in books]
    draws = [Draw(book, ("codes",), seed, SAMPLE_LIMIT, stage) for book, stage in books]
    run_pass(MediaSource(images, model.pass_through, batch, "tokens"), [*counts, *draws], watch)
    return tuple(Tokens(of.counts, *draw.sampler.columns()) for of, draw in zip(counts, draws, strict=True))


def tally(
    model: Model, images: Media, *, seed: int, limit: int, batch: int, watch: Watch
) -> tuple[Sums, tuple[Sample, ...]]:
    """How often each code of the model's codebooks is chosen in the parts of `images` that the processes see, and of
    each codebook a sample of `limit` latents."""
    totals = Totals([(book.key, book.codebook, None) for book in model.books])
    draws = [Draw(book.codebook, ("latents",), seed, limit, stage) for stage, book in enumerate(model.books)]
    run_pass(MediaSource(images, model.pass_through, batch, "tokens"), [totals, *draws], watch)
    return totals.sums, tuple(draw.sampler.sample() for draw in draws)
