"""The one pass over data: batches of latents and their codes go by, and accumulators add them up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import nearest
from codebook_tools.codebook import Codebook
from codebook_tools.data.dataset import Media
from codebook_tools.data.latents import ItemLatents, rows_of
from codebook_tools.data.sampling import Hashed, Named
from codebook_tools.errors import NotFiniteError
from codebook_tools.models.model import Pass
from codebook_tools.runtime import distributed
from codebook_tools.runtime.progress import Watch

_AT_ONCE = 65_536  # latents whose codes are looked up together

Items = Sequence[Named] | Hashed
"""What latents belong to."""


@dataclass(frozen=True, eq=False)
class Batch:
    """What an accumulator gets.

    Attributes:
        items: What the latents belong to, n items.
        latents: Of each codebook, (n * positions, dim) float32, item by item.
        codes: Of each codebook, (n * positions,) int64; none where they are not looked up.
        media: The items and their reconstructions, (n, channels, ...) each; None where there are only latents.
    """

    items: Items
    latents: Sequence[Tensor]
    codes: Sequence[Tensor]
    media: tuple[Tensor, Tensor] | None = None


class Accumulator:
    """What a pass adds up. Parts of the data may be added in any order, by any process."""

    def add(self, batch: Batch) -> None:
        raise NotImplementedError

    def merge(self) -> None:
        """Take in what the other processes added; not defined where one process alone may do the pass."""
        raise NotImplementedError


def run_pass(source: MediaSource | LatentSource, accumulators: Sequence[Accumulator], watch: Watch) -> None:
    """Go over the data once. Of parts, each process ends with what all of them added.

    Raises:
        NotFiniteError: In all processes, where it is raised in one.
    """
    with distributed.alike(NotFiniteError):
        for batch in source.batches(watch):
            for accumulator in accumulators:
                accumulator.add(batch)
    if source.data.part[1] > 1:
        for accumulator in accumulators:
            accumulator.merge()


@dataclass(frozen=True, eq=False)
class MediaSource:
    """Images or clips that go through all of a model.

    Attributes:
        through: The model's pass of a batch, (n, channels, ...).
        batch: Items at a time.
        task: What the progress calls it.
    """

    data: Media
    through: Callable[[Tensor], Pass]
    batch: int
    task: str

    def batches(self, watch: Watch) -> Iterator[Batch]:
        for items, media in _reported(self.data.batches(self.batch), self.data, self.task, watch):
            with torch.no_grad():
                result = self.through(media)
            codes = [codes.flatten() for codes in result.codes]
            yield Batch(items, [*map(rows_of, result.latents)], codes, (media, result.media))


@dataclass(frozen=True, eq=False)
class LatentSource:
    """Latents of one codebook, from files or from an encoder.

    Attributes:
        codebook: None where no codes are asked for.
        task: What the progress calls it.
    """

    data: ItemLatents
    codebook: Codebook | None = None
    task: str = "encode"

    def batches(self, watch: Watch) -> Iterator[Batch]:
        """Several are looked up together: to begin the search for a few latents takes longer than to do it."""
        group, count = list[tuple[Items, Tensor]](), 0
        for items, latents in _reported(self.data.by_item(), self.data, self.task, watch):
            group.append((items, latents.flatten(0, 1)))
            count += len(group[-1][1])
            if count >= _AT_ONCE:
                yield from self._assigned(group)
                group, count = [], 0
        if group:
            yield from self._assigned(group)

    def _assigned(self, group: Sequence[tuple[Items, Tensor]]) -> Iterator[Batch]:
        latents = [rows for _, rows in group]
        if self.codebook is None:
            codes = [torch.empty(0, dtype=torch.int64)] * len(group)
        else:
            codes = [*torch.split(nearest(torch.cat(latents), self.codebook), [*map(len, latents)])]
        for (items, rows), chosen in zip(group, codes, strict=True):
            yield Batch(items, [rows], [chosen])


def _reported(batches: Iterable[Any], data: Media | ItemLatents, task: str, watch: Watch) -> Iterator[Any]:
    """The batches; the watch is told how many items went by, as many in each process' part."""
    done, total = 0, len(data)
    for items, values in batches:
        yield items, values
        done += len(items) * data.part[1]
        watch.progress(task, min(done, total), total)
