"""Seeding of k-means, and new codes drawn by squared error beside existing ones."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codebook_tools.clustering.assignment import nearest, squared_errors
from codebook_tools.codebook import Codebook
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.devices import wide

Init = Literal["kmeans++", "afkmc2", "random"]

_SHORT = 1e-5  # of the longest point: a residual below is float32 rounding
_POINTS, _POINTS_PER_SEED = 4096, 8  # that seeds are drawn from: more take longer and are hardly better


def seeds(points: Tensor, k: int, init: Init, seed: int, weights: Tensor | None = None, power: float = 2.0) -> Tensor:
    """Draw seeds for k-means from the points.

    Args:
        points: (n, dim) float32, in an order in which each head is a uniform sample. Seeds come from the first 4,096,
            or 8 a seed where that is more; from all where these have fewer than k distinct points.
        k: Number of seeds.
        init: How they are drawn.
        seed: Any integer.
        weights: (n,) float64, of the points, for k-means++; all of them are then drawn from.
        power: Of the distance, by which k-means++ draws.

    Returns:
        (k, dim) of the points.

    Raises:
        CodebookError: There are fewer than k distinct points, or their distances overflow.
    """
    refuse_unfit(points, k)
    head = points[: max(_POINTS, _POINTS_PER_SEED * k)]
    data = (head if count_distinct(head, enough=k) == k else points).cpu().contiguous()
    rng = np.random.default_rng(seed % 2**64)  # numpy takes no negative seed
    if init == "kmeans++" and (weights is not None or power != 2):
        among = data if weights is None else points.cpu()
        rows = kmeans_plus_plus(among.numpy(), k, rng, None if weights is None else weights.cpu().numpy(), power)
    else:
        draw = {"kmeans++": kmeans_plus_plus, "afkmc2": afkmc2, "random": _at_random}[init]
        rows = draw(data.numpy(), k, rng)  # type: ignore[operator]  # their type is joined to that of a function
    return torch.from_numpy(rows).to(points.device)


def overflow(points: Tensor) -> bool:
    """Whether the sum of squared distances of points (n, dim) to one of them may overflow float32."""
    room = torch.finfo(torch.float32).max / (4 * max(1, points.numel()))
    return bool((points.abs() > room**0.5).any())


def refuse_unfit(points: Tensor, k: int) -> None:
    """Raise CodebookError where there are fewer than k distinct points (n, dim), or their distances overflow."""
    if overflow(points):
        largest = float(points.abs().max())
        raise CodebookError(f"latents of up to {largest:.0e} are too large: their distances overflow float32")
    distinct = count_distinct(points, enough=k)
    if distinct < k:
        raise CodebookError(
            f"k={k} asks for more codes than the {distinct} distinct latents; "
            f"use --k {distinct} or less, or give more data; where encode returns latents that are quantized already, "
            "return those before the quantizer"
        )


def count_distinct(points: Tensor, enough: int) -> int:
    """Number of distinct rows of points (n, dim), at most `enough`; heads are tried first, which usually suffice."""
    head = min(len(points), 4 * enough)
    while True:
        distinct = len(np.unique(points[:head].cpu().numpy(), axis=0))
        if distinct >= enough or head == len(points):
            return min(distinct, enough)
        head = min(len(points), 8 * head)


def _at_random(data: NDArray[np.float32], k: int, rng: np.random.Generator) -> NDArray[np.float32]:
    return data[rng.choice(len(data), k, replace=False)]


def kmeans_plus_plus(
    data: NDArray[np.float32],
    k: int,
    rng: np.random.Generator,
    weights: NDArray[np.float64] | None = None,
    power: float = 2.0,
) -> NDArray[np.float32]:
    """(k, dim) seeds of data (n, dim), with weights (n,) or alike, by greedy k-means++.

    Each seed is drawn by a power of the distance to the seeds before it, in a few trials, of which the best counts.
    Source: Arthur and Vassilvitskii 2007, "k-means++: The Advantages of Careful Seeding".
    """
    trials = 2 + int(math.log(k))
    rows = data - data.mean(0)  # nearer to 0 the products below round less
    squares = (rows * rows).sum(1)
    chosen = [int(rng.integers(len(rows)) if weights is None else rng.choice(len(rows), p=weights / weights.sum()))]
    errors = _squared_distances(rows, rows[chosen[0]])
    while len(chosen) < k:
        costs = errors if power == 2 else errors ** (power / 2)
        before, up_to = errors, (costs if weights is None else costs * weights).cumsum(dtype=np.float64)
        drawn = np.searchsorted(up_to, rng.random(trials) * up_to[-1], side="right").clip(max=len(rows) - 1)
        left = squares[:, None] - 2 * (rows @ rows[drawn].T) + squares[drawn]
        np.minimum(left, errors[:, None], out=left)
        costs = left if power == 2 else left.clip(min=0) ** (power / 2)
        best = int((costs.sum(0) if weights is None else weights @ costs).argmin())
        chosen.append(int(drawn[best]))
        errors = left[:, best].copy()
        # Where the expanded square cancels it is rounding; copies must have 0, or they might be drawn, too.
        unsure = np.flatnonzero(errors < 1e-3 * (squares + squares[chosen[-1]]))
        errors[unsure] = np.minimum(before[unsure], _squared_distances(rows[unsure], rows[chosen[-1]]))
    return data[chosen]


def _squared_distances(rows: NDArray[np.float32], row: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n,) from differences: 0 for copies, so that none is drawn again."""
    apart = rows - row
    distances: NDArray[np.float32] = np.einsum("nd,nd->n", apart, apart)
    return distances


def afkmc2(data: NDArray[np.float32], k: int, rng: np.random.Generator, chain: int = 200) -> NDArray[np.float32]:
    """(k, dim) seeds by Markov chains that approximate k-means++ in one pass over the data.

    Each seed is the end of a chain of `chain` proposals, drawn half by squared distance to the first seed, half alike.
    Source: Bachem, Lucic, Hassani and Krause 2016, "Fast and Provably Good Seedings for k-Means", algorithm 1.
    """
    rows = data - data.mean(0)
    squares = (rows * rows).sum(1)
    chosen = [int(rng.integers(len(rows)))]
    proposal = _squared_distances(rows, rows[chosen[0]]).astype(np.float64)
    proposal = proposal / max(proposal.sum(), np.finfo(np.float64).tiny) + 1 / len(rows)
    up_to = proposal.cumsum()
    while len(chosen) < k:
        drawn = np.searchsorted(up_to, rng.random(chain) * up_to[-1], side="right").clip(max=len(rows) - 1)
        sizes = squares[drawn][:, None] + squares[chosen]
        apart = sizes - 2 * (rows[drawn] @ rows[chosen].T)
        nearest = np.where(apart > 1e-6 * sizes, apart, 0).min(1)  # what rounding leaves of a distance is none
        draws, at = rng.random(chain), 0
        for step in range(1, chain):
            x, y = drawn[at], drawn[step]
            if nearest[step] * proposal[x] > draws[step] * nearest[at] * proposal[y]:
                at = step
        chosen.append(int(drawn[at]))
    return data[chosen]


def with_direction(points: Tensor, codebook: Codebook) -> Tensor:
    """Those of points (n, dim) that a code may be placed at.

    By cosine, points of almost no length are left out, such as rounding leaves of a residual: their direction is
    arbitrary.
    """
    if not codebook.metric.by_direction or not len(points):
        return points
    lengths = points.norm(dim=1)
    long_enough = lengths > _SHORT * lengths.max()
    return points if bool(long_enough.all()) else points[long_enough]


def draw_by_error(points: Tensor, codebook: Codebook, n: int, seed: int, weights: Tensor | None = None) -> Tensor:
    """Draw points one after the other by squared error to the codes and to the points drawn before.

    This is k-means++ seeding (Arthur and Vassilvitskii 2007) continued from existing codes.

    Args:
        points: (m, dim), in an order in which each head is a uniform sample. Of more than 65,536, or 128 for each draw,
            only a head is drawn from, unless it has too few distinct points.
        codebook: The existing codes.
        n: Number of points to draw.
        seed: Of the drawing.
        weights: (m,) float64, that the errors are multiplied by; all points are then drawn from.

    Returns:
        (n, dim) of the points; fewer where no more of them differ from the codes.
    """
    if weights is not None:
        return _drawn(points, codebook, n, seed, weights)
    placeable = with_direction(points, codebook)
    if len(placeable) < len(points) and len(drawn := draw_by_error(placeable, codebook, n, seed)) == n:
        return drawn
    head = points[: max(65_536, 128 * n)]
    drawn = _drawn(head, codebook, n, seed)
    return drawn if len(drawn) == n or len(head) == len(points) else _drawn(points, codebook, n, seed)


def _drawn(points: Tensor, codebook: Codebook, n: int, seed: int, weights: Tensor | float = 1.0) -> Tensor:
    errors = squared_errors(points, codebook, nearest(points, codebook)) * weights
    emitted = codebook.metric.emit(points)
    random = torch.Generator().manual_seed(seed)
    drawn: list[int] = []
    while len(points) and len(drawn) < n:
        up_to = errors.cumsum(0)
        total = float(up_to[-1])
        if not total > 0:
            break
        at = float(torch.rand((), generator=random, dtype=torch.float64)) * total
        drawn.append(min(int(torch.searchsorted(up_to, at, right=True)), len(points) - 1))
        errors = torch.minimum(errors, wide((emitted - emitted[drawn[-1]]).square().sum(1)) * weights)
    return points[drawn]
