"""The nearest codes of each code, and a search among them alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from codebook_tools.clustering.scores import EPS, lowest, rounding
from codebook_tools.codebook import Codebook
from codebook_tools.runtime.threads import spread

_BLOCK = 16  # points of one cell that are compared to the neighbors of its code at a time
_TILE_BYTES, _ELSEWHERE = {"cpu": 1 << 20}, 128 << 20  # of the codes that blocks are compared to at a time
_COLUMNS = 32  # columns of distances of which first only the least is looked at
_PART = {"cpu": 1 << 14}  # points, about, that a thread searches at a time; a GPU searches all
_CERTAIN = 1 - 1e-4  # of the distance beyond which no code is nearer: float32 rounds


@dataclass(frozen=True, eq=False)
class Neighbors:
    """The nearest codes of each code of a codebook.

    Attributes:
        codes: (size, count) int64, the nearest first, which is the code itself or a copy of it.
        reach: (size,) float32, the distance to the last of them; infinite where all codes are among them.
    """

    codes: Tensor
    reach: Tensor

    @staticmethod
    def of(codebook: Codebook, count: int) -> Neighbors:
        """Those of each code, by the distance of prepared codes. A copy may stand in the place of the code itself."""
        prepared, _ = centered(codebook)
        norms = prepared.square().sum(1)
        count = min(count, codebook.size)
        rows = max(1, _TILE_BYTES.get(prepared.device.type, _ELSEWHERE) // codebook.size)
        work = partial(_nearest_columns, prepared=prepared, norms=norms, count=count)
        tiles = torch.split(prepared, rows)
        codes = torch.cat(list(spread(work, tiles) if prepared.is_cpu else map(work, tiles)))
        reach = (prepared - prepared[codes[:, -1]]).norm(dim=1)
        return Neighbors(codes, reach if count < codebook.size else torch.full_like(reach, torch.inf))

    def search(self, points: Tensor, codebook: Codebook, near: Tensor) -> tuple[Tensor, Tensor]:
        """Assign each point to the nearest of the neighbors of a code near it; near-ties are not decided.

        Args:
            points: (n, dim) float32.
            codebook: The codes, which may have moved since their neighbors were listed.
            near: (n,) int64, a code near each point.

        Returns:
            (n,) int64, and (n,) bool: where no other code is nearer, if the codes are where they were listed. By the
            triangle inequality none is that is farther from `near` than the point's distances to `near` and to the best
            neighbor together.
        """
        prepared, center = centered(codebook)
        weights, norms = -2 * prepared, prepared.square().sum(1)
        blocks, cells = _blocks(near, codebook.size)
        reach = self.reach * (_CERTAIN if rounding() == EPS else 0)  # products may be set to round coarsely
        codes, certain = torch.empty_like(near), torch.empty_like(near, dtype=torch.bool)
        at_once = max(1, _TILE_BYTES.get(points.device.type, _ELSEWHERE) // (4 * points.shape[1] * self.codes.shape[1]))

        def work(part: tuple[Tensor, Tensor]) -> None:
            for rows, cell in zip(*(torch.split(whole, at_once) for whole in part), strict=True):
                among = self.codes[cell]
                ours = codebook.metric.prepare(points.index_select(0, rows.flatten())).sub(center).view(*rows.shape, -1)
                theirs = weights.index_select(0, among.flatten()).view(*among.shape, -1)
                scores = torch.baddbmm(norms[among][:, None], ours, theirs.transpose(1, 2))
                best = lowest(scores)
                codes[rows] = among.gather(1, best)
                squares = ours.square().sum(2)
                to_best = scores.gather(2, best[..., None])[..., 0] + squares
                to_near = scores[..., 0] + squares
                apart = to_best.relu().sqrt() + to_near.relu().sqrt()
                certain[rows] = apart < reach[cell][:, None]

        of_part = _PART.get(points.device.type, len(points)) // _BLOCK + 1
        parts = list(zip(*(torch.split(whole, of_part) for whole in (blocks, cells)), strict=True))
        for _ in spread(work, parts) if points.is_cpu else map(work, parts):
            pass
        return codes, certain


def centered(codebook: Codebook) -> tuple[Tensor, Tensor]:
    """Prepared codes (size, dim) less their mean, and that mean (dim,): products of them round less."""
    prepared = codebook.metric.prepare(codebook.vectors)
    center = prepared.mean(0)
    return prepared - center, center


def _nearest_columns(rows: Tensor, prepared: Tensor, norms: Tensor, count: int) -> Tensor:
    """(n, count) int64: the nearest of all prepared codes (size, dim) to each of rows (n, dim), the nearest first.

    Of many codes, the `count` nearest are in the `count` columns of the least minima.
    """
    scores = torch.addmm(norms, rows, prepared.T, alpha=-2)
    size = scores.shape[1]
    columns = size // _COLUMNS
    if columns <= 2 * count:
        return scores.topk(count, largest=False).indices
    folded, rest = scores[:, : columns * _COLUMNS], scores[:, columns * _COLUMNS :]
    folded = folded.view(len(rows), _COLUMNS, columns)
    best = folded.amin(1).topk(count, largest=False, sorted=False).indices
    picked = folded.gather(2, best[:, None].expand(-1, _COLUMNS, -1)).flatten(1)
    place = torch.cat([picked, rest], 1).topk(count, largest=False).indices
    of_columns = place // count * columns + best.gather(1, place % count)
    return torch.where(place < picked.shape[1], of_columns, place - picked.shape[1] + columns * _COLUMNS)


def _blocks(near: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Points by the code near them, in blocks: (blocks, _BLOCK) int64 of points, and (blocks,) of their codes.

    The last block of a code repeats its last point. near: (n,) of codes below size.
    """
    order = near.argsort(stable=True)
    hits = torch.bincount(near, minlength=size)
    of_cell = (hits + _BLOCK - 1) // _BLOCK
    cells = torch.repeat_interleave(of_cell)
    index = torch.arange(len(cells), device=near.device) - (of_cell.cumsum(0) - of_cell)[cells]
    within = (index * _BLOCK)[:, None] + torch.arange(_BLOCK, device=near.device)
    within = torch.minimum(within, (hits[cells] - 1)[:, None])
    return order[(hits.cumsum(0) - hits)[cells][:, None] + within], cells
