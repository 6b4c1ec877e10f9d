"""Quantizing the codebook itself: fewer codes by merging them, or fewer bits per entry."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from codebook_tools.codebook import Codebook, Latents, Surgery
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.options import Option
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies._validation import EngineOption, check_k

if TYPE_CHECKING:
    from torch import Tensor

_STARTS = 10  # of k-means: codes are few, and weights uneven


@dataclass(frozen=True)
class Quantize:
    """k merged codes, weighted by use, or entries rounded to `bits` bits; latents are not looked at.

    Every old code maps to the one it was merged into; dead codes weigh nothing and go where they are nearest. Of k or
    fewer codes in use none is merged: they stay as they are, and the dead codes nearest to them fill up k. Without any
    counts all codes weigh alike.

    Attributes:
        k: Size of the new codebook.
        method: "kmeans", weighted k-means over the codes, the best of ten starts; or "pnn", pairwise nearest neighbor
            merging (Equitz 1989).
        bits: Of an entry, 2 to 8, in place of k.
        engine: Which k-means runs; see clustering/engines.py.
        seed: Of the k-means.
    """

    summary: ClassVar = (
        "Merge codes that are alike, weighted by use, or round their entries to few bits. Latents are not looked at."
    )
    example: ClassVar = "codebook quantize model.safetensors --k 128 --method pnn --data images/"
    needs: ClassVar = "codebook"

    k: Annotated[int | None, Option("Merge the codes into K.", metavar="K", names=("--k", "-k"))] = None
    method: Annotated[Literal["kmeans", "pnn"], Option("How codes are merged.")] = "kmeans"
    bits: Annotated[int | None, Option("Round entries to B bits, 2 to 8, instead.", metavar="B")] = None
    seed: int = 0
    engine: EngineOption = "auto"

    def __post_init__(self) -> None:
        if (self.k is None) == (self.bits is None):
            raise CodebookError("quantize takes either --k, to merge codes, or --bits, to round their entries")
        if self.k is not None:
            check_k(self.k)
        if self.bits is not None and not 2 <= self.bits <= 8:
            raise CodebookError(f"bits={self.bits} is not within 2 and 8; --bits 8 has the least error")
        if self.method not in ("kmeans", "pnn"):
            raise CodebookError(f"method={self.method} is neither kmeans nor pnn")

    def __call__(self, codebook: Codebook, latents: Latents, counts: Tensor) -> Surgery:
        """Merge codes, or round their entries."""
        import torch

        from codebook_tools.clustering.assignment import nearest
        from codebook_tools.clustering.engines import chosen
        from codebook_tools.clustering.pnn import merge_pairs

        if self.bits is not None:
            rounded = replace(codebook, vectors=round_rows(codebook.vectors, self.bits))
            return Surgery(rounded, torch.arange(codebook.size), bits=self.bits)
        assert self.k is not None
        if self.k > codebook.size:
            raise CodebookError(f"k={self.k} of {codebook.size} codes; use --k {codebook.size} or less")
        if 0 < int((counts > 0).sum()) <= self.k:
            return _filled_up(codebook, counts > 0, self.k)
        weights = counts.double() if int(counts.sum()) else torch.ones(codebook.size, dtype=torch.float64)
        used, emitted, engine, reason = weights > 0, codebook.emitted, None, None
        if self.method == "pnn":
            merge = merge_pairs(emitted[used].double().numpy(), weights[used].numpy(), self.k)
            rows, labels = (torch.from_numpy(part) for part in merge)
        else:
            rows, labels = self._merge_by_kmeans(emitted[used], weights[used], self.k)
            choice = chosen(self.engine, self.k, codebook.dim)
            engine, reason = choice.engine, choice.reason
        merged = replace(codebook, vectors=rows.float())
        index_map = nearest(emitted, merged)
        index_map[used] = labels
        return Surgery(merged, index_map, engine=engine, engine_reason=reason)

    def _merge_by_kmeans(self, rows: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Of fewer distinct codes than k, some of the merged ones are alike."""
        from codebook_tools.clustering.assignment import nearest
        from codebook_tools.clustering.engines import cluster
        from codebook_tools.clustering.seeding import count_distinct

        distinct = count_distinct(rows, enough=k)
        merged = cluster(
            rows, distinct, engine=self.engine, starts=_STARTS, seed=self.seed, weights=weights, watch=Watch()
        ).centroids
        merged = merged[[*range(distinct), *[0] * (k - distinct)]]
        return merged, nearest(rows, Codebook(merged))


def _filled_up(codebook: Codebook, used: Tensor, k: int) -> Surgery:
    """The codes in use, (size,) bool, and the dead ones nearest to them, up to k, in their old order."""
    import torch

    from codebook_tools.clustering.assignment import nearest, squared_errors

    emitted, dead = codebook.emitted, (~used).nonzero()[:, 0]
    among = Codebook(emitted[used])
    errors = squared_errors(emitted[dead], among, nearest(emitted[dead], among))
    fill = dead[errors.argsort(stable=True)[: k - int(used.sum())]]
    kept = torch.cat([used.nonzero()[:, 0], fill]).sort().values
    filled = replace(codebook, vectors=codebook.vectors[kept])
    index_map = nearest(emitted, filled)
    index_map[kept] = torch.arange(k)
    return Surgery(filled, index_map)


def round_rows(rows: Tensor, bits: int) -> Tensor:
    """Round each row to 2**bits - 1 levels that are symmetric about 0, up to its largest entry.

    No entry moves by more than half a step, max|row| / (2**bits - 2).

    Args:
        rows: (size, dim) float32.
        bits: Of an entry, 2 to 8.

    Returns:
        (size, dim) float32.
    """
    import torch

    levels = 2 ** (bits - 1) - 1
    steps = rows.double().abs().amax(1, keepdim=True) / levels
    return torch.where(steps > 0, (rows / steps.clamp(min=torch.finfo(torch.float64).tiny)).round() * steps, 0).float()


def packed_bytes(codebook: Codebook, bits: int) -> int:
    """Bytes that a codebook rounded by `round_rows` packs to: `bits` an entry, and a float32 step a row."""
    return (codebook.size * codebook.dim * bits + 7) // 8 + 4 * codebook.size
