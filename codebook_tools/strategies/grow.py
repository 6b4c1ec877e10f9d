"""Growing: the codes in use stay, and new ones are drawn where the error is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from codebook_tools.codebook import Codebook, Latents, Surgery
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.options import Option
from codebook_tools.strategies._validation import check_k
from codebook_tools.strategies.prune import Prune

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Grow:
    """The codes in use, in their old order, and after them latents drawn by squared error, up to k.

    The codes in use keep their rows and their identity. New ones are drawn as seeds of k-means++ are (Arthur and
    Vassilvitskii 2007), continued from the codes in use.

    Attributes:
        k: Size of the new codebook.
        seed: Of the drawing.
    """

    summary: ClassVar = "Keep the codes in use, drop the dead ones, and place new ones where the error is, up to K."
    example: ClassVar = "codebook grow model.safetensors --k 128 --data images/ --steps 1000"

    k: Annotated[int, Option("Codes of the new codebook: those in use or more.", metavar="K", names=("--k", "-k"))]
    seed: int = 0

    def __post_init__(self) -> None:
        check_k(self.k)

    def __call__(self, codebook: Codebook, latents: Latents, counts: Tensor) -> Surgery:
        """Keep the codes in use, and add latents up to k."""
        in_use = int((counts > 0).sum())
        if not in_use:
            raise CodebookError("every code is dead: there is none to grow from; use refit")
        if in_use > self.k:
            raise CodebookError(
                f"k={self.k} is less than the {in_use} codes in use; use --k {in_use} or more, or refit"
            )
        surgery = grown(codebook, latents, counts, self.k, self.seed)
        most = surgery.codebook.size
        if most < self.k:
            raise CodebookError(
                f"k={self.k} asks for more codes than the {most} that the distinct latents allow; "
                f"use --k {most} or less, or give more data"
            )
        return surgery


def grown(codebook: Codebook, latents: Latents, counts: Tensor, k: int, seed: int) -> Surgery:
    """The codes in use, and latents drawn by squared error up to k codes.

    Args:
        codebook: The old codebook.
        latents: The latents.
        counts: (codebook.size,) int64.
        k: Size of the new codebook; it is smaller where fewer latents differ from the codes.
        seed: Of the drawing.
    """
    import torch

    from codebook_tools.clustering.seeding import draw_by_error
    from codebook_tools.data.latents import joined

    pruned = Prune()(codebook, latents, counts)
    used = pruned.codebook
    points = joined(latents)
    more = points[draw_by_error(points, used, k - used.size, seed)]
    return replace(pruned, codebook=replace(used, vectors=torch.cat([used.vectors, more])))
