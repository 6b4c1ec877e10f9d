"""The stream of training batches, determined by a seed and a position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from codebook_tools.data.dataset import Media
from codebook_tools.runtime import distributed


class Batches:
    """Endless batches: each epoch visits every item once, in a new seeded order; a short last batch is dropped.

    Items of unlike length are in batches of one length, of which the short ones are kept, with less weight.

    Of several processes each gets its own slice of every batch.

    Attributes:
        images: The items to train on.
        size: Items to a batch over all processes, at most all items.
        seed: Of the order.
        stand_in: (1, ...), the item that a process gets where its slice has no readable one.
        drawn: Batches drawn so far; iteration starts there.
    """

    def __init__(self, images: Media, size: int, seed: int, stand_in: Tensor) -> None:
        self.images, self.size, self.seed, self.stand_in = images, min(size, len(images)), seed, stand_in
        self.drawn, self._ragged = 0, images.ragged

    def __iter__(self) -> Iterator[tuple[Tensor, float]]:
        """This process's slice of each batch, and the fraction of the batch's readable items that are in it."""
        for items, pixels in self.images.stream(islice(self._indices(), self.drawn, None)):
            self.drawn += 1
            readable = int(distributed.summed(torch.tensor(len(items)))) if self.images.skip_bad else self.size
            if readable:
                yield pixels if items else self.stand_in, len(items) / readable

    def _indices(self) -> Iterator[Sequence[int]]:
        random, own = torch.Generator().manual_seed(self.seed), distributed.own_slice(self.size)
        while True:
            order = torch.randperm(len(self.images), generator=random).tolist()
            batches = self.images.alike(order, self.size)
            yield from (batch[own] for batch in batches if len(batch) == self.size or self._ragged)
