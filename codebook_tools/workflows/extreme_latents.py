"""Which latents lie nearest to each code, and which farthest from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import squared_errors
from codebook_tools.data.items import Item
from codebook_tools.data.latents import rows_of
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.receptive_field import Place, require_images
from codebook_tools.models.evidence import untrained
from codebook_tools.runtime.progress import Watch
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.session import Opened, open_request


@dataclass(frozen=True, eq=False)
class Seen:
    """counts, errors: (size,) of each code, hits and the sum of squared distances. nearest, farthest: of each code that
    was hit, the places of the latents at its ends, the outermost first. grid: rows and columns of latents."""

    counts: Tensor
    errors: Tensor
    nearest: Mapping[int, Sequence[Place]]
    farthest: Mapping[int, Sequence[Place]]
    grid: tuple[int, int]

    @property
    def used(self) -> Tensor:
        """(size,) bool."""
        return self.counts > 0

    @property
    def error(self) -> Tensor:
        """(size,): the mean squared distance of a code's latents, 0 of a dead one."""
        return self.errors / self.counts.clamp(min=1)


def open_images(request: Request, watch: Watch) -> Opened:
    """A model whose latents are shown by patches of images. Raises CodebookError where it takes none."""
    opened = open_request(request, watch)
    opened.warnings += untrained(opened.model.checkpoint, opened.codebooks)
    require_images(opened.model)
    return opened


def grid_of(latents: Tensor) -> tuple[int, int]:
    """Rows and columns of latents (n, dim, *grid); of any but two axes, one row."""
    grid = latents.shape[2:]
    return (grid[0], grid[1]) if len(grid) == 2 else (1, grid.numel())


def see(opened: Opened, stage: int, top: int, watch: Watch) -> Seen:
    """One pass over the calibration data. top: places of each kind for a code."""
    model, book = opened.model, opened.model.books[stage].codebook
    counts, errors = torch.zeros(book.size, dtype=torch.int64), torch.zeros(book.size, dtype=torch.float64)
    near, far = _Ends(top), _Ends(top)
    items_seen, grid = list[Item](), (1, 1)
    for items, pixels in opened.calibration.batches(opened.request.batch_size):
        with watch.phase("encode"), torch.no_grad():
            latents = model.encode(pixels, stage, keep=False)
            codes = model.assign(latents, stage)
        grid = grid_of(latents)
        flat, rows = codes.flatten().cpu(), rows_of(latents)
        distances = squared_errors(rows, book, codes.flatten()).cpu()
        counts += torch.bincount(flat, minlength=book.size)
        errors.index_add_(0, flat, distances)
        positions = grid[0] * grid[1]
        at = torch.arange(len(flat)) + len(items_seen) * positions
        near.add(flat, distances, at)
        far.add(flat, -distances, at)
        items_seen += items
        watch.progress("see the codes", len(items_seen), len(opened.calibration))
    if not items_seen:
        raise CodebookError("none of the calibration images can be read")
    nearest, farthest = (ends.places(items_seen, grid) for ends in (near, far))
    return Seen(counts, errors, nearest, farthest, grid)


class _Ends:
    """Of each code the `most` latents with the lowest scores, of all that were added."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.codes, self.scores, self.at = torch.empty(0).long(), torch.empty(0).double(), torch.empty(0).long()

    def add(self, codes: Tensor, scores: Tensor, at: Tensor) -> None:
        codes, scores, at = (torch.cat(pair) for pair in ((self.codes, codes), (self.scores, scores), (self.at, at)))
        kept = lowest_of_each(codes, scores, self.most)
        self.codes, self.scores, self.at = codes[kept], scores[kept], at[kept]

    def places(self, items: Sequence[Item], grid: tuple[int, int]) -> dict[int, list[Place]]:
        found, (rows, columns) = dict[int, list[Place]](), grid
        for code, at in zip(self.codes.tolist(), self.at.tolist(), strict=True):
            item, position = divmod(at, rows * columns)
            found.setdefault(code, []).append(Place(items[item], *divmod(position, columns)))
        return found


def lowest_of_each(codes: Tensor, scores: Tensor, most: int) -> Tensor:
    """Indices of the `most` lowest scores of each code, by code and rising score; the first among equals."""
    order = scores.argsort(stable=True)
    order = order[codes[order].argsort(stable=True)]
    ordered = codes[order]
    rank = torch.arange(len(order)) - torch.searchsorted(ordered, ordered)
    return order[rank < most]
