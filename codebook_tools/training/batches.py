"""The stream of training batches, which the seed and its place in it say all about."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from codebook_tools.data.dataset import Media
from codebook_tools.runtime import distributed


class Batches:
    """Endless batches: every image once in a seeded order, then in another. The last, short batch is left out.

    Of several processes each has its own slice of every batch, and the share of the readable images that it is: 0 where
    there are none in it, and `stand_in`, one image, is there in their place. drawn: batches that went by, from the
    first; an iteration begins there.
    """

    def __init__(self, images: Media, size: int, seed: int, stand_in: Tensor) -> None:
        self.images, self.size, self.seed, self.stand_in = images, min(size, len(images)), seed, stand_in
        self.drawn = 0

    def __iter__(self) -> Iterator[tuple[Tensor, float]]:
        for items, pixels in self.images.stream(islice(self._places(), self.drawn, None)):
            self.drawn += 1
            readable = int(distributed.summed(torch.tensor(len(items)))) if self.images.skip_bad else self.size
            if readable:
                yield pixels if items else self.stand_in, len(items) / readable

    def _places(self) -> Iterator[list[int]]:
        random, own = torch.Generator().manual_seed(self.seed), distributed.own_slice(self.size)
        while True:
            order = torch.randperm(len(self.images), generator=random).tolist()
            starts = range(0, len(order) - self.size + 1, self.size)
            yield from (order[start : start + self.size][own] for start in starts)
