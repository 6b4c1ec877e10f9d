"""Seeded latents and codes, and the nearest code by brute force."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def column(*numbers: float) -> Tensor:
    """(n, 1) float32."""
    return torch.tensor(numbers, dtype=torch.float32)[:, None]


def blobs(count: int, clusters: int, dim: int, seed: int = 0) -> Tensor:
    """Points around well-separated centers, in random order."""
    generator = torch.Generator().manual_seed(seed)
    centers = 20 * torch.randn(clusters, dim, generator=generator)
    labels = torch.randint(clusters, (count,), generator=generator)
    return centers[labels] + torch.randn(count, dim, generator=generator)


DEAD = (1, 4, 5, 9, 12, 15)
"""Codes of `with_dead_codes` that lie far from every latent."""


def with_dead_codes(latents: Tensor) -> Tensor:
    """(16, dim): of latents (n, dim) far from each other, so that each code in use has latents of its own, and DEAD."""
    chosen, alive = [0], [i for i in range(16) if i not in DEAD]
    while len(chosen) < len(alive):
        chosen.append(int(torch.cdist(latents, latents[chosen]).min(1).values.argmax()))
    codes = torch.full((16, latents.shape[1]), 50.0) + torch.arange(16)[:, None]
    codes[alive] = latents[chosen]
    return codes


def looked_up(latents: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """By brute force: latents (n, dim, *grid) -> their codes' vectors, alike, and codes (n, *grid)."""
    rows = latents.movedim(1, -1)
    chosen = (rows[..., None, :].double() - codes.double()).square().sum(-1).argmin(-1)
    return codes[chosen].movedim(-1, 1), chosen
