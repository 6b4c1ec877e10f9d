"""Streams of latents that can be read repeatedly, from memory or by encoding images again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from codebook_tools.codebook import Latents
from codebook_tools.data.dataset import Media
from codebook_tools.data.items import Item
from codebook_tools.data.rows import all_finite
from codebook_tools.data.sampling import Hashed, Named
from codebook_tools.errors import CodebookError


@dataclass(frozen=True, eq=False)
class StoredLatents:
    """Latents that fit in memory.

    Attributes:
        vectors: (n, dim) float32.
        batch: Rows per batch.
    """

    vectors: Tensor
    batch: int = 65_536

    def __len__(self) -> int:
        return len(self.vectors)

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.split(self.vectors, self.batch)


class ItemLatents(Protocol):
    """Latents grouped by the items (images, clips, rows of files) they belong to; the length counts items."""

    @property
    def part(self) -> tuple[int, int]:
        """Index and number of the parts of which `by_item` gives one, as Media.part."""
        ...

    def __len__(self) -> int: ...

    def by_item(self) -> Iterator[tuple[Sequence[Named] | Hashed, Tensor]]:
        """Batches: items or their hashes, and their latents, (n, positions, dim) float32."""
        ...


@dataclass(frozen=True, eq=False)
class EncodedLatents:
    """Latents of images, encoded anew at each reading.

    Attributes:
        images: The images, or clips.
        encode: Media (n, channels, ...) to latents (n, positions, dim) float32.
        batch: Items per batch.
    """

    images: Media
    encode: Callable[[Tensor], Tensor]
    batch: int = 64

    def __iter__(self) -> Iterator[Tensor]:
        for _, latents in self.by_item():
            yield latents.flatten(0, 1)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def part(self) -> tuple[int, int]:
        """That of the images."""
        return self.images.part

    def by_item(self) -> Iterator[tuple[Sequence[Item], Tensor]]:
        """Batches of items and their latents, (n, positions, dim) float32.

        Raises:
            CodebookError: Names the first item whose latents are not finite.
        """
        for items, pixels in self.images.batches(self.batch):
            latents = self.encode(pixels)
            if not all_finite(latents):
                finite = torch.isfinite(latents).flatten(1).all(1)
                raise CodebookError(f"the encoder's latents of {items[int(finite.int().argmin())].name} are not finite")
            yield items, latents


def joined(latents: Latents) -> Tensor:
    """All latents of a stream, (n, dim) float32."""
    return latents.vectors if isinstance(latents, StoredLatents) else torch.cat(list(latents))


def rows_of(latents: Tensor) -> Tensor:
    """Reshape latents (n, dim, *grid) to (n * positions, dim)."""
    return latents.movedim(1, -1).flatten(0, -2)
