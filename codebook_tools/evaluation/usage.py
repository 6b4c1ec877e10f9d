"""The one pass over latents that counts, measures and samples them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import nearest, squared_errors
from codebook_tools.codebook import Codebook
from codebook_tools.data.latents import Batch, ItemLatents, StoredLatents
from codebook_tools.data.sampling import SAMPLE_LIMIT, Sampler
from codebook_tools.runtime import distributed
from codebook_tools.runtime.progress import Watch

_AT_ONCE = 65_536  # latents whose codes are looked up together


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


def survey(latents: ItemLatents, codebook: Codebook, *, seed: int, limit: int = SAMPLE_LIMIT, watch: Watch) -> Survey:
    """Encode, count and sample in one pass; of parts, what all processes found together."""
    counts = torch.zeros(codebook.size, dtype=torch.int64)
    error, parts = torch.zeros((), dtype=torch.float64), latents.part[1]
    sampler = Sampler(seed, limit)
    sampler.add([], 0, torch.empty(0, codebook.dim), torch.empty(0, dtype=torch.int64))  # a part may have no batch

    def told() -> Iterator[Batch]:
        done = 0
        for items, batch in latents.by_item():
            done += len(items) * parts
            watch.progress("encode", min(done, len(latents)), len(latents))
            yield items, batch

    for held in _grouped(told()):
        batches = [batch.flatten(0, 1) for _, batch in held]
        codes = nearest(torch.cat(batches), codebook)
        counts += torch.bincount(codes, minlength=codebook.size).cpu()
        for (items, batch), rows, its in zip(held, batches, torch.split(codes, [*map(len, batches)]), strict=True):
            error += squared_errors(rows, codebook, its).sum().cpu()
            sampler.add(items, batch.shape[1], rows, its)
    if parts > 1:
        counts, error = distributed.summed(counts), distributed.summed(error)
    rows, codes = sampler.columns(parts)
    return Survey(counts, int(counts.sum()), StoredLatents(rows), codes, float(error))


def _grouped(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Several at a time: finding the nearest codes of a few latents takes longer to begin than to do."""
    held, rows = list[Batch](), 0
    for items, latents in batches:
        held.append((items, latents))
        rows += latents.shape[0] * latents.shape[1]
        if rows >= _AT_ONCE:
            yield held
            held, rows = [], 0
    if held:
        yield held
