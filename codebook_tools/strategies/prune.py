"""Pruning: drop rarely used codes, and leave the others as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from codebook_tools.codebook import REMOVED, Codebook, Latents, Surgery
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.options import Option
from codebook_tools.strategies._validation import check_threshold

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Prune:
    """Codes with more than `threshold` counts stay, or, with `keep`, the `keep` most used; in their old order.

    With threshold 0 no latent that was counted changes its code: the surgery is lossless there.

    Attributes:
        threshold: The count up to which a code is dropped.
        keep: How many codes stay, in place of a threshold.
    """

    summary: ClassVar = (
        "Drop the codes that are hardly used. Threshold 0 changes no reconstruction of what was counted."
    )
    example: ClassVar = "codebook prune model.safetensors --threshold 0 --data images/"
    needs: ClassVar = "counts"
    keeps: ClassVar = True

    threshold: Annotated[int, Option("Drop codes that count N or fewer.", metavar="N")] = 0
    keep: Annotated[int | None, Option("Keep the K most used codes instead.", metavar="K")] = None

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if self.keep is not None and self.threshold:
            raise CodebookError(
                f"threshold={self.threshold} and keep={self.keep} ask for different codes; give one of them"
            )
        if self.keep is not None and self.keep < 1:
            raise CodebookError(f"keep={self.keep} is below 1; use --keep 1 or more")

    def __call__(self, codebook: Codebook, latents: Latents, counts: Tensor) -> Surgery:
        """Keep the codes with enough counts, and their order."""
        import torch

        if self.keep is not None:
            if self.keep > codebook.size:
                raise CodebookError(f"keep={self.keep} of {codebook.size} codes; use --keep {codebook.size} or less")
            kept = counts.argsort(descending=True, stable=True)[: self.keep].sort().values
        else:
            kept = (counts > self.threshold).nonzero()[:, 0]
        if len(kept) == 0:
            most = int(counts.max())
            way_out = f"use --threshold {most - 1} or less" if most else "use --keep, or give more data"
            raise CodebookError(
                f"threshold={self.threshold} removes every code: the most used one counts {most}; {way_out}"
            )
        index_map = torch.full((codebook.size,), REMOVED)
        index_map[kept] = torch.arange(len(kept))
        return Surgery(replace(codebook, vectors=codebook.vectors[kept].clone()), index_map)
