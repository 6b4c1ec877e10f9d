"""Assignment: the nearest code of each latent, independent of tile, thread and device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from codebook_tools.clustering.groups import LEAST_CODES, LONGEST, ROWS_PER_GROUP, Groups
from codebook_tools.clustering.kept_groups import KeptGroups
from codebook_tools.clustering.scores import EPS, not_above, product, rounding, two_lowest
from codebook_tools.codebook import Codebook, Metric
from codebook_tools.runtime.devices import has_float64, wide
from codebook_tools.runtime.threads import spread

# Scores that fit the cache of one core are searched fastest; a GPU needs far larger tiles. Both stay under 256 MB.
_TILE_BYTES, _ELSEWHERE = {"cpu": 2 << 20}, 128 << 20
_EXACT_BYTES = 32 << 20
_CODES = 1024  # searched at a time, on a CPU
_CANDIDATES = 8  # codes of the lowest scores that float64 decides among where the host may not wait

_SAMPLE = 64  # latents, by which it is decided whether codes are searched by groups


def nearest(latents: Tensor, codebook: Codebook, *, wait: bool = True, kept: KeptGroups | None = None) -> Tensor:
    """Assign each latent to its nearest code by the codebook's metric; to the lowest index among equals.

    The search runs in float32 over tiles of at most 128 MB; on a CPU, of many codes only those are compared whose group
    may hold the nearest (groups.py). Where the two best scores lie within float32's rounding of
    each other, float64 decides. So the result does not depend on tile, thread or codebook size: dropping unused codes
    changes no assignment.

    Args:
        latents: (n, dim) float32 on any device; the codes are moved there.
        codebook: The codes and their metric.
        wait: Whether the host may wait for an accelerator, as it must to select near-ties. In a training step it should
            not: float64 then decides among the eight codes of the lowest scores of each latent, which is the same
            unless more than eight lie within rounding of each other.
        kept: The groups of an earlier search among these codes, or among codes of which few differ; those of this one
            are left in it.

    Returns:
        (n,) int64 on the device of the latents; some code for latents that are not finite.
    """
    codes = codebook.metric.prepare(codebook.vectors.to(latents.device))
    if len(codes) == 1:
        return torch.zeros(len(latents), dtype=torch.int64, device=latents.device)
    search = _Search(codes, codebook.metric)
    search.group(latents, kept or KeptGroups())
    tiles = torch.split(latents, search.rows)
    if not (wait or latents.is_cpu) and has_float64(latents.device) and rounding() == EPS:
        return torch.cat([search.settle(tile) for tile in tiles])
    alone = not latents.is_cpu or len(tiles) == 1
    results = map(search, tiles) if alone else spread(search, tiles)
    index, best, second = (torch.cat(parts) for parts in zip(*results, strict=True))
    limit = best + search.slack(latents, best)
    # Scores that overflow are infinite, or no numbers.
    unsure = (~((second > limit) & second.isfinite() & best.isfinite())).nonzero()[:, 0]
    if len(unsure):
        index[unsure] = search.decide(latents[unsure], limit[unsure])
    return index


def nearest_few(latents: Tensor, codebook: Codebook, count: int) -> Tensor:
    """The nearest codes of each latent, the nearest first.

    Args:
        latents: As for `nearest`.
        codebook: As for `nearest`.
        count: How many; at most the codebook's size.

    Returns:
        (n, count) int64. The first is that of `nearest`; the order of the others is that of float32.
    """
    first = nearest(latents, codebook)[:, None]
    if count == 1:
        return first
    search = _Search(codebook.metric.prepare(codebook.vectors.to(latents.device)), codebook.metric)
    others = []
    tiles = (torch.split(rows, max(1, _ELSEWHERE // (4 * codebook.size))) for rows in (latents, first))
    for rows, taken in zip(*tiles, strict=True):
        scores = torch.addmm(search.norms, codebook.metric.prepare(rows), search.weights.T)
        others.append(scores.scatter_(1, taken, torch.inf).topk(count - 1, largest=False).indices)
    return torch.cat([first, torch.cat(others)], 1)


class _Search:
    """A search among prepared codes (size, dim), with all that is computed once for all latents."""

    def __init__(self, codes: Tensor, metric: Metric) -> None:
        self.codes, self.metric = codes, metric
        squares = metric.is_distance
        # |x|² - 2xc + |c|², less |x|², which is the same for all codes.
        self.weights = -2 * codes if squares else -codes
        lengths = codes.norm(dim=1)
        self.norms = lengths.square() if squares else torch.zeros_like(lengths)
        self.longest = lengths.max()
        size, dim = codes.shape
        at_once = min(size, _CODES) if codes.is_cpu else size
        self.starts = range(0, size, at_once)
        self.blocks = list(zip(torch.split(self.weights, at_once), torch.split(self.norms, at_once), strict=True))
        self.groups: Groups | None = None
        self.rows = max(1, _TILE_BYTES.get(codes.device.type, _ELSEWHERE) // (4 * max(at_once, dim)))

    def group(self, latents: Tensor, kept: KeptGroups) -> None:
        """Search by groups of codes where that is faster for latents (n, dim), of which it tries a few."""
        size = len(self.codes)
        enough = size >= LEAST_CODES and len(latents) >= ROWS_PER_GROUP * math.isqrt(size)
        if not (latents.is_cpu and self.metric.is_distance and enough and bool(self.longest < LONGEST)):
            return

        def pays(groups: Groups) -> bool:
            few = self.metric.prepare(latents[:: len(latents) // _SAMPLE])
            return groups.are_few(few, self(few)[1])

        self.groups = kept.of(self.weights, self.norms, pays)
        if self.groups is not None:
            self.rows = self.groups.rows

    def __call__(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (n, dim) -> (n,) int64, the code with the lowest score; that score (n,) float32; and the second."""
        latents = self.metric.prepare(latents)
        if self.groups is not None:
            return self.groups(latents, self.slack)
        index, best, second = two_lowest(product(latents, *self.blocks[0]))
        for start, block in zip(self.starts[1:], self.blocks[1:], strict=True):
            new_index, new_best, new_second = two_lowest(product(latents, *block))
            index = torch.where(new_best < best, new_index + start, index)
            second = torch.minimum(torch.maximum(best, new_best), torch.minimum(second, new_second))
            best = torch.minimum(best, new_best)
        return index, best, second

    def slack(self, latents: Tensor, best: Tensor) -> Tensor:
        """(n,) float32, a bound on the rounding error of the gap between two scores of latents (n, dim).

        An inner product of `dim` terms has an error of dim times the rounding of one term, relative to the product of
        the lengths: Higham 2002, section 3.1. Only a code about as near as the best may be confused with it, so its
        length is bounded by the latent's plus the best distance. The last term is for products too small for float32.
        """
        terms, longest = 2 * (self.codes.shape[1] + 4), self.longest
        relative = terms * rounding()
        by_direction = self.metric.by_direction
        lengths = torch.ones_like(best) if by_direction else self.metric.prepare(latents).norm(dim=1)
        if self.metric.is_distance and not by_direction:
            squares = lengths.square()
            longest = torch.minimum(lengths + 1.1 * ((best + squares).relu() + 8 * relative * squares).sqrt(), longest)
        slack: Tensor = relative * longest * (lengths + longest) + terms * torch.finfo(torch.float32).tiny
        return slack

    def decide(self, latents: Tensor, limit: Tensor) -> Tensor:
        """(n,) int64, decided in float64 among the codes whose float32 scores are within limit (n,)."""
        latents = self.metric.prepare(latents)
        rows = max(1, _EXACT_BYTES // (8 * len(self.codes)))
        codes = []
        for tile, bound in zip(torch.split(latents, rows), torch.split(limit, rows), strict=True):
            row, code = self._within(tile, bound)
            exact = self._exact(tile, row, code)
            row, code = row.to(exact.device), code.to(exact.device)
            least = exact.new_full((len(tile),), torch.inf).scatter_reduce_(0, row, exact, "amin")
            equal = exact == least[row]
            lowest = code.new_zeros(len(tile))  # and 0 for what is no number
            codes.append(lowest.scatter_reduce_(0, row[equal], code[equal], "amin", include_self=False))
        return torch.cat(codes).to(latents.device)

    def _within(self, latents: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs of a row of latents (n, dim) and a code that may be as near as limit (n,) says: (pairs,) int64 each."""
        if self.groups is not None:
            return self.groups.within(latents, limit)
        return not_above(torch.addmm(self.norms, latents, self.weights.T), limit)

    def settle(self, latents: Tensor) -> Tensor:
        """(n,) int64, decided in float64 among the codes of the lowest float32 scores, without making the host wait."""
        latents = self.metric.prepare(latents)
        scores = torch.addmm(self.norms, latents, self.weights.T)
        codes = scores.topk(min(_CANDIDATES, len(self.codes)), largest=False).indices
        rows = torch.arange(len(latents), device=latents.device)[:, None].expand_as(codes)
        exact = self._exact(latents, rows.flatten(), codes.flatten()).view_as(codes)
        farther = exact > exact.amin(1, keepdim=True)
        return codes.masked_fill(farther, len(self.codes)).amin(1)

    def _exact(self, latents: Tensor, rows: Tensor, codes: Tensor) -> Tensor:
        """(pairs,) float64 scores of the pairs of a row of latents (n, dim) and a code.

        From differences, which do not cancel as the expanded square does, and each pair summed alone: a matrix product
        may round the scores of equal codes differently by their column.
        """
        scores = []
        at_once = max(1, _EXACT_BYTES // (8 * self.codes.shape[1]))
        for row, code in zip(torch.split(rows, at_once), torch.split(codes, at_once), strict=True):
            x, c = wide(latents[row]), wide(self.codes[code])
            scores.append((x - c).square().sum(1) if self.metric.is_distance else -(x * c).sum(1))
        return torch.cat(scores)


def squared_errors(latents: Tensor, codebook: Codebook, codes: Tensor) -> Tensor:
    """Squared Euclidean distance, summed over dimensions, from each emitted latent to its emitted code.

    Args:
        latents: (n, dim) float32.
        codebook: The codes.
        codes: (n,) int64, the code of each latent.

    Returns:
        (n,) float64, on the CPU where the device has no float64. Summed in float32, unless a sum overflows there:
        codes that diverged in training must still be comparable, for they are to be replaced.
    """
    emitted = codebook.emitted.to(latents.device)

    def work(part: tuple[Tensor, Tensor]) -> Tensor:
        differences = codebook.metric.emit(part[0]) - emitted[part[1]]
        errors = wide(differences.square().sum(1))
        return errors if bool(errors.isfinite().all()) else wide(differences).square().sum(1)

    rows = max(1, _TILE_BYTES.get(latents.device.type, _ELSEWHERE) // (4 * latents.shape[1]))
    parts = list(zip(torch.split(latents, rows), torch.split(codes, rows), strict=True))
    return torch.cat(list(spread(work, parts) if latents.is_cpu and len(parts) > 1 else map(work, parts)))
