"""Groups of codes near each other: a latent is compared with those alone that may hold its nearest code."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from codebook_tools.clustering.scores import product, rounding, two_lowest
from codebook_tools.runtime.devices import wide
from codebook_tools.runtime.threads import spread

LEAST_CODES = 8192  # below, a comparison with all is as fast
ROWS_PER_GROUP = 16  # of the latents: fewer are not worth the grouping

_SCORES = 1 << 19  # at a time: they fit the cache of one core
_ROWS_BYTES = 16 << 20  # of what a tile of latents needs for each group
_AT_ONCE = 16  # products of a thread
_FEW = 0.2  # of the codes: where more are left to compare with, a comparison with all is as fast
_ABOVE = 1 + 1e-6  # rounds a factor up
_LONGEST = 1e15  # whose products stay finite


@dataclass(frozen=True, eq=False)
class Groups:
    """Codes, sorted by the nearest of a few of them, the centers.

    A latent in the half-space of its nearest center is farther from a group than from the plane halfway to the group's
    center. Where that is farther than the best code among those of its own center, the group is left out: for latents
    of few intrinsic dimensions, as those of most encoders, nearly all are. Source: Elkan 2003, "Using the Triangle
    Inequality to Accelerate k-Means", with planes in place of balls.

    Attributes:
        centers: (groups, dim) times -2, and (groups,) their squared lengths.
        apart: (groups, groups) float32, twice the distance between two centers.
        order: (size,) int64, codes group by group.
        parts: The index of the first code in `order`, weights and squared lengths of the codes of each group.
        longest: Length of the longest code.
        rows: Latents that are searched for at a time.
    """

    centers: tuple[Tensor, Tensor]
    apart: Tensor
    order: Tensor
    parts: list[tuple[int, Tensor, Tensor]]
    longest: float
    rows: int

    @staticmethod
    def of(codes: Tensor, weights: Tensor, norms: Tensor) -> Groups | None:
        """Group codes (size, dim), with what scores them; None where their products may overflow."""
        size, longest = len(codes), float(norms.max()) ** 0.5
        if not longest < _LONGEST:
            return None
        count = math.isqrt(size) // 2  # more leave fewer codes to compare, and take longer to go through
        chosen = torch.arange(count) * size // count
        centers = weights[chosen], norms[chosen]
        tiles = torch.split(codes, _SCORES // count)
        group = torch.cat([two_lowest(product(tile, *centers))[0] for tile in tiles])
        order, sizes = group.argsort(stable=True), torch.bincount(group, minlength=count)
        exact = wide(codes[chosen])
        between = torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist")
        starts, each = (sizes.cumsum(0) - sizes).tolist(), sizes.tolist()
        sorted_rows = zip(torch.split(weights[order], each), torch.split(norms[order], each), strict=True)
        parts = [(start, *rows) for start, rows in zip(starts, sorted_rows, strict=True)]
        rows = max(1, _ROWS_BYTES // (4 * count))
        return Groups(centers, (2 * _ABOVE * between).float(), order, parts, longest, rows)

    def are_few(self, latents: Tensor, best: Tensor) -> bool:
        """Whether few codes are left to compare latents (n, dim) with, whose lowest scores, or bounds, are (n,)."""
        scores = product(latents, *self.centers)
        sizes = torch.tensor([len(norms) for _, _, norms in self.parts], dtype=torch.float32)
        left = self._near(latents, scores, scores.argmin(1, keepdim=True), best).float() @ sizes
        return float(left.mean()) < _FEW * len(self.order)

    def __call__(self, latents: Tensor, slack: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Search for the nearest codes.

        Args:
            latents: (n, dim) float32, on a CPU.
            slack: Of latents (n, dim) and their lowest scores (n,), the rounding error (n,) of these.

        Returns:
            (n,) int64, the code of the lowest score; that score (n,) float32; and the second, or one that is not above
            it. The true score of a code that was left out is above the lowest one.
        """
        scores = product(latents, *self.centers)
        home = torch.from_numpy(scores.numpy().argmin(1)[:, None])
        own = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, home, True)
        compared = self._compare(latents, own)
        best = _merged(len(latents), *compared)[1]
        near = self._near(latents, scores, home, best + slack(latents, best))
        more = self._compare(latents, near & ~own)
        index, best, second = _merged(len(latents), *(torch.cat(both) for both in zip(compared, more, strict=True)))
        return index, best, second.clamp(max=torch.finfo(torch.float32).max)

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
        return ~(beyond > self.apart[home[:, 0]].mul_(reach[:, None]))

    def _compare(self, latents: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compare latents (n, dim) with the groups that are wanted (n, groups).

        Returns:
            A row of the latents, its nearest code in a group, the score of that, and the second lowest: (pairs,) each.
        """
        group, each = wanted.T.nonzero().unbind(1)
        rows = torch.split(each, torch.bincount(group, minlength=len(self.parts)).tolist())
        work = [(some, part) for row, part in zip(rows, self.parts, strict=True) for some in _tiles(row, len(part[1]))]

        def compare(share: list[tuple[Tensor, tuple[int, Tensor, Tensor]]]) -> list[tuple[Tensor, ...]]:
            results = list[tuple[Tensor, ...]]()
            for row, (start, weights, norms) in share:
                # oneDNN would compile a kernel for each shape.
                index, best, second = two_lowest(torch.addmm(norms, latents[row], weights.T))
                results.append((row, self.order[index + start], best, second))
            return results

        shares = [work[at : at + _AT_ONCE] for at in range(0, len(work), _AT_ONCE)]
        nothing = (each[:0], each[:0], latents[:0, 0], latents[:0, 0])
        results = [nothing, *(result for share in spread(compare, shares) for result in share)]
        row, index, best, second = (torch.cat(parts) for parts in zip(*results, strict=True))
        return row, index, best, second


def _tiles(row: Tensor, size: int) -> Sequence[Tensor]:
    """Rows of latents that are compared with `size` codes at a time."""
    return torch.split(row, max(1, _SCORES // size)) if size and len(row) else ()


def _merged(n: int, row: Tensor, index: Tensor, best: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The lowest two scores of each of n rows, from those in several groups: code (n,), score (n,), second (n,)."""
    lowest = best.new_full((n,), torch.inf).scatter_reduce_(0, row, best, "amin")
    won = best == lowest[row]
    winner = index.new_zeros(n).scatter_(0, row[won], index[won])
    others = torch.where(index == winner[row], second, best)
    return winner, lowest, best.new_full((n,), torch.inf).scatter_reduce_(0, row, others, "amin")
