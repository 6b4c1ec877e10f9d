"""The one pass over data: sources give batches of latents and codes, which accumulators add up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import nearest
from codebook_tools.codebook import Codebook
from codebook_tools.data.dataset import Media
from codebook_tools.data.latent_files import FileLatents
from codebook_tools.data.latents import ItemLatents, rows_of
from codebook_tools.data.sampling import Hashed, Named
from codebook_tools.errors import NotFiniteError
from codebook_tools.models.from_latents import AT_ONCE, LatentsModel
from codebook_tools.models.model import Pass
from codebook_tools.runtime import distributed
from codebook_tools.runtime.progress import Watch

_AT_ONCE = 65_536  # latents in a nearest-code search

Items = Sequence[Named] | Hashed
"""The items that latents belong to, or hashes of their names."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Input of an accumulator.

    Attributes:
        items: n items.
        latents: Of each codebook, (n * positions, dim) float32, item by item.
        codes: Of each codebook, (n * positions,) int64; empty where they are not searched.
        media: Items and reconstructions, (n, channels, ...) each; None where there are only latents.
        stages: Of each quantizer stage, (n, *grid) int64 codes; empty where there are only latents.
    """

    items: Items
    latents: Sequence[Tensor]
    codes: Sequence[Tensor]
    media: tuple[Tensor, Tensor] | None = None
    stages: Sequence[Tensor] = ()


class Accumulator(ABC):
    """Adds up batches of a pass, which may come in any order and in any process."""

    @abstractmethod
    def add(self, batch: Batch) -> None:
        """Add one batch."""

    def merge(self) -> None:
        """Take in what the other processes added. Left out where the command runs in one process alone."""
        raise AssertionError(f"{type(self).__name__} adds up in one process alone")


def run_pass(
    source: MediaSource | WalkSource | LatentSource, accumulators: Sequence[Accumulator], watch: Watch
) -> None:
    """Pass over the data once. Where processes read parts of it, the accumulators of each end with the whole.

    Args:
        source: Gives the batches.
        accumulators: Get every batch.
        watch: Is told the progress.

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
    """Images or clips that pass through all of a model.

    Attributes:
        data: The images or clips.
        through: Passes a batch, (n, channels, ...), through the model.
        batch: Items per batch.
        task: Label of the progress.
    """

    data: Media
    through: Callable[[Tensor], Pass]
    batch: int
    task: str

    def batches(self, watch: Watch) -> Iterator[Batch]:
        """Batches with latents, codes and reconstructions."""
        for items, media in _reported(self.data.batches(self.batch), self.data, self.task, watch):
            with torch.no_grad():
                result = self.through(media)
            codes = [codes.flatten() for codes in result.codes]
            yield Batch(items, [*map(rows_of, result.latents)], codes, (media, result.media), result.stages)


@dataclass(frozen=True, eq=False)
class WalkSource:
    """Rows of files that walk through all stages of a model, of which nothing is decoded.

    Attributes:
        data: The files.
        model: Which rows enter.
        task: Label of the progress.
    """

    data: FileLatents
    model: LatentsModel
    task: str

    def batches(self, watch: Watch) -> Iterator[Batch]:
        """Batches with latents and codes."""
        for hashes, rows in _reported(self.data.batches(AT_ONCE), self.data, self.task, watch):
            with torch.no_grad():
                result = self.model.pass_through(rows)
            codes = [codes.flatten() for codes in result.codes]
            yield Batch(hashes, [*map(rows_of, result.latents)], codes, stages=result.stages)


@dataclass(frozen=True, eq=False)
class LatentSource:
    """Latents of one codebook, from files or from an encoder.

    Attributes:
        data: The latents.
        codebook: In which nearest codes are searched; None for no search.
        task: Label of the progress.
    """

    data: ItemLatents
    codebook: Codebook | None = None
    task: str = "encode"

    def batches(self, watch: Watch) -> Iterator[Batch]:
        """Batches with latents and codes; the search runs over several at once, as each start of it is costly."""
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
        """The batches of a group with their codes."""
        latents = [rows for _, rows in group]
        if self.codebook is None:
            codes = [torch.empty(0, dtype=torch.int64)] * len(group)
        else:
            codes = [*torch.split(nearest(torch.cat(latents), self.codebook), [*map(len, latents)])]
        for (items, rows), chosen in zip(group, codes, strict=True):
            yield Batch(items, [rows], [chosen])


def _reported(batches: Iterable[Any], data: Media | ItemLatents, task: str, watch: Watch) -> Iterator[Any]:
    """The batches, with progress reported as if every process were equally far."""
    done, total = 0, len(data)
    for items, values in batches:
        yield items, values
        done += len(items) * data.part[1]
        watch.progress(task, min(done, total), total)
