"""Groups of codes near each other: a latent is compared with those alone that may hold its nearest code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from codebook_tools.clustering.scores import lowest, not_above, rounding, two_lowest
from codebook_tools.runtime.devices import wide
from codebook_tools.runtime.threads import spread

LEAST_CODES = 8192  # below, a comparison with all is as fast
ROWS_PER_GROUP = 16  # of the latents: fewer are not worth the grouping
LONGEST = 1e15  # code whose products stay finite

_SCORES = 1 << 19  # at a time: they fit the cache of one core
_ROWS_BYTES = 16 << 20  # of what a tile of latents needs for each group
_AT_ONCE = 16  # products of a thread
_FEW = 0.2  # of the codes: where more are left to compare with, a comparison with all is as fast
_ABOVE = 1 + 1e-6  # rounds a factor up


@dataclass(frozen=True, eq=False)
class Centers:
    """Points among the codes, by the nearest of which codes are grouped.

    Attributes:
        weights: (groups, dim), the centers times -2.
        norms: (groups,), their squared lengths.
        apart: (groups, groups) float32, twice the distance between two centers.
    """

    weights: Tensor
    norms: Tensor
    apart: Tensor

    @staticmethod
    def of(weights: Tensor) -> Centers:
        """Centers with weights (groups, dim)."""
        exact = wide(weights) / -2
        apart = torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist")
        return Centers(weights, exact.square().sum(1).float(), (2 * _ABOVE * apart).float())

    @staticmethod
    def among(weights: Tensor) -> Centers:
        """Centers of codes with weights (size, dim): means of the codes that are nearest to one of a few."""
        size = len(weights)
        count = math.isqrt(size) // 2  # more leave fewer codes to compare, and take longer to go through
        few = weights[torch.arange(count) * size // count]
        group = Centers.of(few).groups_of(weights).long()
        sums = torch.zeros_like(few).index_add_(0, group, weights)
        sizes = torch.bincount(group, minlength=count)[:, None]
        return Centers.of(torch.where(sizes > 0, sums / sizes, few))

    def scores(self, rows: Tensor) -> Tensor:
        """(n, groups), of rows (n, dim)."""
        return torch.addmm(self.norms, rows, self.weights.T)  # oneDNN would compile a kernel for each number of rows

    def groups_of(self, weights: Tensor) -> Tensor:
        """(n,) int16, the nearest center of codes with weights (n, dim)."""
        tiles = torch.split(weights, _SCORES // len(self.norms))
        return torch.cat([lowest(self.scores(tile / -2)) for tile in tiles]).short()


@dataclass(frozen=True, eq=False)
class Groups:
    """Codes, sorted by the nearest of a few of them, the centers.

    A latent in the half-space of its nearest center is farther from a group than from the plane halfway to the group's
    center. Where that is farther than the best code among those of its own center, the group is left out: for latents
    of few intrinsic dimensions, as those of most encoders, nearly all are. Source: Elkan 2003, "Using the Triangle
    Inequality to Accelerate k-Means", with planes in place of balls.

    Attributes:
        centers: The centers.
        parts: Indices (n,) int64, weights (n, dim) and squared lengths (n,) of the codes of each group.
        longest: Length of the longest code or center.
        rows: Latents that are searched for at a time.
    """

    centers: Centers
    parts: list[tuple[Tensor, Tensor, Tensor]]
    longest: float
    rows: int

    @staticmethod
    def of(centers: Centers, group: Tensor, weights: Tensor, norms: Tensor) -> Groups:
        """Sort codes, with weights (size, dim) and squared lengths (size,), by their group (size,) int16."""
        order = torch.from_numpy(group.numpy().argsort(kind="stable"))  # of int16, numpy's is by radix
        count = len(centers.norms)
        sizes = np.bincount(group.numpy(), minlength=count).tolist()
        sorted_rows = (rows.index_select(0, order) for rows in (weights, norms))
        parts = zip(*(torch.split(rows, sizes) for rows in (order, *sorted_rows)), strict=True)
        longest = float(max(norms.max(), centers.norms.max())) ** 0.5
        return Groups(centers, list(parts), longest, max(1, _ROWS_BYTES // (4 * count)))

    def are_few(self, latents: Tensor, best: Tensor) -> bool:
        """Whether few codes are left to compare latents (n, dim) with, whose lowest scores, or bounds, are (n,)."""
        sizes = torch.tensor([len(norms) for _, _, norms in self.parts], dtype=torch.float32)
        left = self._near(latents, *self._home(latents), best).float() @ sizes
        return float(left.mean()) < _FEW * float(sizes.sum())

    def __call__(self, latents: Tensor, slack: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Search for the nearest codes.

        Args:
            latents: (n, dim) float32, on a CPU.
            slack: Of latents (n, dim) and their lowest scores (n,), the rounding error (n,) of these.

        Returns:
            (n,) int64, the code of the lowest score; that score (n,) float32; and the second, or one that is not above
            it. The true score of a code that was left out is above the lowest one.
        """
        scores, home = self._home(latents)
        own = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, home, True)
        compared = self._compare(latents, own)
        best = _merged(len(latents), compared)[1]
        near = self._near(latents, scores, home, best + slack(latents, best))
        more = self._compare(latents, near & ~own)
        index, best, second = _merged(len(latents), compared + more)
        return index, best, second.clamp(max=torch.finfo(torch.float32).max)

    def within(self, latents: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs of a row of latents (n, dim) and a code whose score is not above limit (n,): (pairs,) int64 each."""

        def measure(row: Tensor, codes: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
            at, code = not_above(scores, limit.index_select(0, row))
            return row.index_select(0, at), codes.index_select(0, code)

        pairs = self._each(latents, self._near(latents, *self._home(latents), limit), measure)
        row, code = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        return row, code

    def _home(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (n, groups) of the centers for latents (n, dim), and the nearest center (n, 1) int64."""
        scores = self.centers.scores(latents)
        return scores, lowest(scores)[:, None]

    def _near(self, latents: Tensor, scores: Tensor, home: Tensor, best: Tensor) -> Tensor:
        """(n, groups) bool, whether a group may hold a code with a score as low as best (n,).

        Args:
            latents: (n, dim).
            scores: (n, groups), of the centers.
            home: (n, 1) int64, the nearest center.
            best: (n,), bounds of the lowest scores.
        """
        squares = wide(latents).square().sum(1)
        reach = (best + squares).relu().sqrt().float() * _ABOVE
        error = 8 * (latents.shape[1] + 4) * rounding() * (squares.sqrt().float() + 2 * self.longest).square()
        beyond = scores.sub(scores.gather(1, home) + error[:, None])
        return ~(beyond > self.centers.apart.index_select(0, home[:, 0]).mul_(reach[:, None]))

    def _compare(self, latents: Tensor, wanted: Tensor) -> list[tuple[Tensor, ...]]:
        """Compare latents (n, dim) with the groups that are wanted (n, groups).

        Returns:
            Of each tile rows of the latents, their nearest codes in a group, the scores of these, and the second
            lowest: (rows,) each.
        """

        def measure(row: Tensor, codes: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
            index, best, second = two_lowest(scores)
            return row, codes.index_select(0, index), best, second

        return list(self._each(latents, wanted, measure))

    def _each(
        self, latents: Tensor, wanted: Tensor, measure: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
    ) -> Iterator[tuple[Tensor, ...]]:
        """Score the codes of the groups that are wanted (n, groups) for latents (n, dim), tile by tile.

        Args:
            latents: The latents.
            wanted: Which groups.
            measure: Called with rows (m,) of the latents, the codes (size,) of a group, and their scores (m, size).

        Yields:
            What `measure` returns.
        """
        group, each = wanted.T.nonzero().unbind(1)
        rows = torch.split(each, torch.bincount(group, minlength=len(self.parts)).tolist())
        work = [(some, part) for row, part in zip(rows, self.parts, strict=True) for some in _tiles(row, len(part[1]))]

        def compare(share: list[tuple[Tensor, tuple[Tensor, Tensor, Tensor]]]) -> list[tuple[Tensor, ...]]:
            # Not by oneDNN here either: shapes differ.
            return [
                measure(row, codes, torch.addmm(norms, latents.index_select(0, row), weights.T))
                for row, (codes, weights, norms) in share
            ]

        shares = [work[at : at + _AT_ONCE] for at in range(0, len(work), _AT_ONCE)]
        for results in spread(compare, shares):
            yield from results


def _tiles(row: Tensor, size: int) -> Sequence[Tensor]:
    """Rows of latents that are compared with `size` codes at a time."""
    return torch.split(row, max(1, _SCORES // size)) if size and len(row) else ()


def _merged(n: int, compared: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor, Tensor]:
    """The lowest two scores of each of n rows, from those in several groups: code (n,), score (n,), second (n,)."""
    least = torch.full((n,), torch.inf)
    if not compared:  # the groups have no codes
        return torch.zeros(n, dtype=torch.int64), least, least
    row, index, best, second = (torch.cat(parts) for parts in zip(*compared, strict=True))
    least.scatter_reduce_(0, row, best, "amin")
    won = best == least[row]
    winner = index.new_zeros(n).scatter_(0, row[won], index[won])
    others = torch.where(index == winner[row], second, best)
    return winner, least, torch.full((n,), torch.inf).scatter_reduce_(0, row, others, "amin")
