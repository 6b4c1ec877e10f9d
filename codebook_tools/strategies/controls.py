"""Controls: what a surgery must beat to be worth its trouble."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from codebook_tools.codebook import REMOVED, Codebook, Latents, Surgery
from codebook_tools.errors import CodebookError
from codebook_tools.strategies._validation import check_k
from codebook_tools.strategies.prune import Prune

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TopK:
    """The k most used codes, as they are, dead ones among them where fewer are in use.

    Attributes:
        k: Size of the new codebook.
    """

    k: int

    def __post_init__(self) -> None:
        check_k(self.k)

    def __call__(self, codebook: Codebook, latents: Latents, counts: Tensor) -> Surgery:
        """Keep the k most used codes."""
        if self.k > codebook.size:
            raise CodebookError(f"k={self.k} of {codebook.size} codes; use --k {codebook.size} or less")
        return Prune(keep=self.k)(codebook, latents, counts)


@dataclass(frozen=True)
class RandomLatents:
    """k latents, drawn uniformly: a codebook from the data without any clustering (Forgy 1965's seeds).

    Attributes:
        k: Size of the new codebook.
        seed: Of the drawing.
    """

    init: ClassVar[Literal["random", "kmeans++"]] = "random"

    k: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_k(self.k)

    def __call__(self, codebook: Codebook, latents: Latents, counts: Tensor) -> Surgery:
        """Draw k latents."""
        import torch

        from codebook_tools.clustering.seeding import seeds
        from codebook_tools.data.latents import joined

        vectors = seeds(joined(latents), self.k, self.init, self.seed)
        return Surgery(replace(codebook, vectors=vectors), torch.full((codebook.size,), REMOVED))


@dataclass(frozen=True)
class KmeansSeeds(RandomLatents):
    """k seeds of k-means++ (Arthur and Vassilvitskii 2007) without Lloyd after them: what the iterations add to."""

    init = "kmeans++"
