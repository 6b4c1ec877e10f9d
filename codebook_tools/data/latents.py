"""Latents: streams that can be read twice, from memory or from images that are encoded anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from codebook_tools.codebook import Latents
from codebook_tools.data.dataset import Media
from codebook_tools.data.items import Item
from codebook_tools.data.sampling import Hashed, Named
from codebook_tools.errors import CodebookError


@dataclass(frozen=True, eq=False)
class StoredLatents:
    """Latents that fit in memory. vectors: (n, dim) float32. batch: rows a batch."""

    vectors: Tensor
    batch: int = 65_536

    def __len__(self) -> int:
        return len(self.vectors)

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.split(self.vectors, self.batch)


class ItemLatents(Protocol):
    """Latents that are known by the items they belong to, how many of which there are. part: which of how many parts of
    them `by_item` gives; as Media.part. Of each batch it gives the items and their latents, (n, positions, dim)
    float32."""

    @property
    def part(self) -> tuple[int, int]: ...

    def __len__(self) -> int: ...

    def by_item(self) -> Iterator[tuple[Sequence[Named] | Hashed, Tensor]]: ...


@dataclass(frozen=True, eq=False)
class EncodedLatents:
    """Latents of images, encoded anew at each reading.

    encode: images (n, channels, height, width) in [0, 1] -> (n, positions, dim) float32.
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
        return self.images.part

    def by_item(self) -> Iterator[tuple[list[Item], Tensor]]:
        """Items and their latents, (n, positions, dim). Raises CodebookError at the first that is not finite."""
        for items, pixels in self.images.batches(self.batch):
            latents = self.encode(pixels)
            if not all_finite(latents):
                finite = torch.isfinite(latents).flatten(1).all(1)
                raise CodebookError(f"the encoder's latents of {items[int(finite.int().argmin())].name} are not finite")
            yield items, latents


def all_finite(values: Tensor) -> bool:
    """Of one value at least. In one pass without a mask: it is asked of every batch."""
    low, high = torch.aminmax(values)  # which hand on a NaN
    return bool(low.isfinite() & high.isfinite())


def joined(latents: Latents) -> Tensor:
    """(n, dim) float32: all of them."""
    return latents.vectors if isinstance(latents, StoredLatents) else torch.cat(list(latents))


def rows_of(latents: Tensor) -> Tensor:
    """(n * positions, dim), of latents (n, dim, ...)."""
    return latents.movedim(1, -1).flatten(0, -2)
