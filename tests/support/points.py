"""Seeded latents and codes for tests of clustering and strategies."""

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
