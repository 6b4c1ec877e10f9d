"""The stream of training batches, determined by a seed and a position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, islice, tee

import torch
from torch import Tensor

from codebook_tools.data.dataset import Media
from codebook_tools.runtime import distributed


class Batches:
    """Endless batches: each epoch visits every item once, in a new seeded order; a short last batch is dropped.

    Items of unlike length are in batches of one length, of which the short ones are kept, with less weight.

    Of several processes each gets its own slice of every batch. Every other epoch may be of mirror images.

    Attributes:
        images: The items to train on.
        size: Items to a batch over all processes, at most all items.
        seed: Of the order.
        stand_in: (1, ...), the item that a process gets where its slice has no readable one.
        mirror: Whether the second, fourth, ... epoch is of images flipped along their last axis.
        drawn: Batches drawn so far; iteration starts there.
    """

    def __init__(self, images: Media, size: int, seed: int, stand_in: Tensor, mirror: bool = False) -> None:
        self.images, self.size, self.seed, self.stand_in = images, min(size, len(images)), seed, stand_in
        self.mirror = mirror
        self.drawn, self._ragged = 0, images.ragged

    def __iter__(self) -> Iterator[tuple[Tensor, float]]:
        """This process's slice of each batch, and the fraction of the batch's readable items that are in it."""
        ahead, now = tee(islice(self._indices(), self.drawn, None))
        stream = self.images.stream(own for own, _ in ahead)
        for (_, mirrored), (items, pixels) in zip(now, stream, strict=True):
            self.drawn += 1
            readable = int(distributed.summed(torch.tensor(len(items)))) if self.images.skip_bad else self.size
            if readable:
                media = pixels if items else self.stand_in
                yield media.flip(-1) if mirrored else media, len(items) / readable

    def _indices(self) -> Iterator[tuple[Sequence[int], bool]]:
        """This process's slice of each batch, and whether its items are mirrored."""
        random, own = torch.Generator().manual_seed(self.seed), distributed.own_slice(self.size)
        for epoch in count():
            order = torch.randperm(len(self.images), generator=random).tolist()
            for batch in self.images.alike(order, self.size):
                if len(batch) == self.size or self._ragged:
                    yield batch[own], self.mirror and epoch % 2 == 1
