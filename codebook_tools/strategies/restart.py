"""Random restart: dead codes are moved to where the latents are; the codebook keeps its size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

from codebook_tools.codebook import REMOVED, Codebook, Latents, Surgery
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.options import Option
from codebook_tools.strategies._validation import check_threshold

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Method = Literal["error", "random", "split", "nearest"]

_NOISE = 0.01  # of the latents' deviation from their code: enough to separate two copies, too little to lose latents


@dataclass(frozen=True)
class Restart:
    """Codes with `threshold` counts or fewer are moved; the others stay as they are, and keep their identity.

    Attributes:
        method: Where codes are moved to. "error": latents drawn by their squared error. "random": latents drawn
            uniformly (Dhariwal et al. 2020, Jukebox). "split": the most used codes, each with a little noise, which
            then share their latents (Linde, Buzo and Gray 1980). "nearest": the latent nearest to the dead code, as
            CVQ-VAE's "closest" anchors (Zheng and Vedaldi 2023).
        threshold: The count up to which a code is moved.
        seed: Of what is drawn.
    """

    summary: ClassVar = (
        "Move dead codes to where latents are. The codebook keeps its size, and codes in use stay as they are."
    )
    example: ClassVar = "codebook restart model.safetensors --method error --data images/ --steps 1000"

    method: Annotated[
        Method, Option("Where to: latents drawn by error or alike, used codes, or the nearest latent.")
    ] = "error"
    threshold: Annotated[int, Option("Move codes that count N or fewer.", metavar="N")] = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise CodebookError(f"method={self.method} is none of {', '.join(get_args(Method))}")
        check_threshold(self.threshold)

    def __call__(self, codebook: Codebook, latents: Latents, counts: Tensor) -> Surgery:
        """Move the codes with few counts."""
        import torch

        from codebook_tools.clustering.assignment import nearest
        from codebook_tools.clustering.seeding import draw_by_error, with_direction
        from codebook_tools.data.latents import joined

        points = joined(latents)
        dead = (counts <= self.threshold).nonzero()[:, 0]
        living = replace(codebook, vectors=codebook.vectors[counts > self.threshold])
        if not living.size:
            most = int(counts.max())
            way_out = f"use --threshold {most - 1} or less" if most else "use refit"
            raise CodebookError(
                f"threshold={self.threshold} moves every code: the most used one counts {most}; {way_out}"
            )
        if len(placeable := points[with_direction(points, codebook)]) >= len(dead):
            points = placeable
        random = torch.Generator().manual_seed(self.seed)
        if self.method == "error":
            new = points[draw_by_error(points, living, len(dead), self.seed)]
        elif self.method == "random":
            new = points[torch.randperm(len(points), generator=random)[: len(dead)]]
        elif self.method == "split":
            new = _split(living, points, counts[counts > self.threshold], len(dead), random)
        else:
            new = points[nearest(codebook.vectors[dead], replace(codebook, vectors=points))]
        if len(new) < len(dead):
            raise CodebookError(
                f"{len(dead)} codes are to be moved, but only {len(new)} latents are there for them; "
                "give more data, or use prune"
            )
        vectors = codebook.vectors.clone()
        vectors[dead] = new
        index_map = torch.arange(codebook.size)
        index_map[dead] = REMOVED
        return Surgery(replace(codebook, vectors=vectors), index_map)


def _split(living: Codebook, points: Tensor, counts: Tensor, n: int, random: torch.Generator) -> Tensor:
    """(n, dim) copies of the most used codes, in order and cyclically, with a little noise."""
    import torch

    from codebook_tools.clustering.assignment import nearest, squared_errors

    order = counts.argsort(descending=True, stable=True)
    parents = living.vectors[order[torch.arange(n) % len(order)]]
    spread = (squared_errors(points, living, nearest(points, living)).mean() / living.dim).sqrt()
    if living.metric.has_unit_rows:  # the errors are those of rows at unit length
        spread = spread * parents.norm(dim=1, keepdim=True)
    return parents + _NOISE * spread * torch.randn(parents.shape, generator=random)
