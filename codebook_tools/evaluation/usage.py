"""Usage of codebooks: passes that count how often each code is chosen, and sample latents."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from codebook_tools.codebook import Codebook
from codebook_tools.data.latents import ItemLatents, StoredLatents
from codebook_tools.data.sampling import SAMPLE_LIMIT, Sample
from codebook_tools.evaluation.accumulators import Draw, Sums, Totals, Usage
from codebook_tools.evaluation.one_pass import LatentSource, MediaSource, WalkSource, run_pass
from codebook_tools.models.model import Model
from codebook_tools.runtime.progress import Watch


@dataclass(frozen=True, eq=False)
class Survey:
    """Result of one pass over the calibration latents.

    Attributes:
        counts: (size,) int64, assignments per code.
        total: Number of latents.
        sample: (n, dim) float32, ordered by hash, so that every head of it is a uniform sample; all latents up to the
            limit.
        codes: (n,) int64, nearest codes of the sample.
        error: Sum of squared distances from all latents to their codes.
    """

    counts: Tensor
    total: int
    sample: StoredLatents
    codes: Tensor
    error: float

    @property
    def sampled(self) -> bool:
        """Whether the sample is not all of the latents."""
        return len(self.sample) < self.total

    def remarks(self, exact: bool) -> list[str]:
        """Warnings where the sample is not all of the latents. exact: whether k-means uses all of them nonetheless."""
        if not self.sampled:
            return []
        what = "index maps see" if exact else "k-means and index maps see"
        return [f"{what} a sample of {len(self.sample):,} of {self.total:,} latents"]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Codes of one codebook over all of the data.

    Attributes:
        counts: (size,) int64, or floating point where they are estimated from a sample.
        sample: (n,) int64, codes of the latents that a Sampler of the seed draws, in its order.
    """

    counts: Tensor
    sample: Tensor


def survey(latents: ItemLatents, codebook: Codebook, *, seed: int, limit: int = SAMPLE_LIMIT, watch: Watch) -> Survey:
    """Encode, count and sample in one pass, over the parts of all processes.

    Args:
        latents: Latents of the codebook.
        codebook: In which nearest codes are searched.
        seed: Of the sample.
        limit: Latents in the sample at most.
        watch: Is told the progress.

    Raises:
        CodebookError: No item can be read.
    """
    usage, draw = Usage(codebook), Draw(codebook, ("latents", "codes"), seed, limit)
    run_pass(LatentSource(latents, codebook), [usage, draw], watch)
    rows, codes = draw.sampler.columns()
    return Survey(usage.counts, int(usage.counts.sum()), StoredLatents(rows), codes, float(usage.error))


def tokenize(model: Model, source: MediaSource | WalkSource, *, seed: int, watch: Watch) -> tuple[Tokens, ...]:
    """The tokens of each of the model's codebooks, over the parts of all processes.

    Args:
        model: Whose codebooks they are.
        source: Passes data through that model.
        seed: Of the samples.
        watch: Is told the progress.

    Raises:
        CodebookError: No item can be read.
    """
    books = [(book.codebook, stage) for stage, book in enumerate(model.books)]
    usages = [Usage(book, stage) for book, stage in books]
    draws = [Draw(book, ("codes",), seed, SAMPLE_LIMIT, stage) for book, stage in books]
    run_pass(source, [*usages, *draws], watch)
    return tuple(Tokens(usage.counts, *draw.sampler.columns()) for usage, draw in zip(usages, draws, strict=True))


def tally(
    model: Model, source: MediaSource | WalkSource, *, seed: int, limit: int, watch: Watch
) -> tuple[Sums, tuple[Sample, ...]]:
    """Sums without reconstructions, and a sample of the latents of each codebook, over the parts of all processes.

    Args:
        model: Whose codebooks they are.
        source: Passes data through that model.
        seed: Of the samples.
        limit: Latents in a sample at most.
        watch: Is told the progress.
    """
    totals = Totals([(book.key, book.codebook, None) for book in model.books])
    draws = [Draw(book.codebook, ("latents",), seed, limit, stage) for stage, book in enumerate(model.books)]
    run_pass(source, [totals, *draws], watch)
    return totals.sums, tuple(draw.sampler.sample() for draw in draws)
