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
_GREEDY = 1024  # seeds at most that are drawn in a few trials each; with more, that would take longest
_ROUNDED = 1e-12  # of two squared lengths: what rounding in float64 leaves of the distance of equal points
_AT_ONCE = 4096  # proposals at most at a time,
_ONE_IN = 2  # and half as many as there are codes: few are near each other, so most are accepted


def seeds(points: Tensor, k: int, init: Init, seed: int, weights: Tensor | None = None, power: float = 2.0) -> Tensor:
    """Draw seeds for k-means from the points.

    Args:
        points: (n, dim) float32, in an order in which each head is a uniform sample. Seeds come from the first 4,096,
            of more than 1,024 from the first 8 a seed; from all where these have fewer than k distinct points.
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
    head = points[: _POINTS if k <= _GREEDY else _POINTS_PER_SEED * k]
    among = head if weights is None and not overflow(points) and count_distinct(head, enough=k) == k else points
    if among is points:
        refuse_unfit(points, k)
    rng = np.random.default_rng(seed % 2**64)  # numpy takes no negative seed
    if init != "kmeans++":
        draw = {"afkmc2": afkmc2, "random": _at_random}[init]
        return torch.from_numpy(draw(among.cpu().contiguous().numpy(), k, rng)).to(points.device)
    if k <= _GREEDY:
        of = None if weights is None else weights.cpu().numpy()
        rows = kmeans_plus_plus(among.cpu().contiguous().numpy(), k, rng, of, power)
        return torch.from_numpy(rows).to(points.device)
    first = rng.integers(len(among)) if weights is None else rng.choice(len(among), p=_shares(weights.cpu().numpy()))
    more = _drawn(among, Codebook(among[int(first)][None]), k - 1, seed, weights, power)
    drawn = torch.cat([more.new_tensor([first]), more])
    if len(drawn) < k:  # the others are too near to these for float32 to tell
        others = torch.ones(len(among), dtype=torch.bool, device=among.device)
        others[drawn] = False
        drawn = torch.cat([drawn, others.nonzero()[: k - len(drawn), 0]])
    return among[drawn]


def overflow(points: Tensor) -> bool:
    """Whether the sum of squared distances of points (n, dim) to one of them may overflow float32."""
    room = torch.finfo(torch.float32).max / (4 * max(1, points.numel()))
    return bool(len(points)) and max(map(abs, map(float, points.aminmax()))) > room**0.5


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
    chosen = [int(rng.integers(len(rows)) if weights is None else rng.choice(len(rows), p=_shares(weights)))]
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


def _shares(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


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
    """(n,) bool: which of points (n, dim) a code may be placed at.

    By cosine, those of almost no length are left out, such as rounding leaves of a residual: their direction is
    arbitrary.
    """
    if not codebook.metric.by_direction or not len(points):
        return torch.ones(len(points), dtype=torch.bool, device=points.device)
    lengths = points.norm(dim=1)
    return torch.gt(lengths, _SHORT * lengths.max())


def draw_by_error(
    points: Tensor, codebook: Codebook, n: int, seed: int, weights: Tensor | None = None, codes: Tensor | None = None
) -> Tensor:
    """Draw points one after the other by squared error to the codes and to the points drawn before.

    This is k-means++ seeding (Arthur and Vassilvitskii 2007) continued from existing codes.

    Args:
        points: (m, dim), in an order in which each head is a uniform sample. Of more than 65,536, or 128 for each draw,
            only a head is drawn from, unless it has too few distinct points.
        codebook: The existing codes.
        n: Number of points to draw.
        seed: Of the drawing.
        weights: (m,) float64, that the errors are multiplied by; all points are then drawn from.
        codes: (m,) int64, the code of each point; None for the nearest.

    Returns:
        (n,) int64, indices of points; fewer where no more of them differ from the codes.
    """
    if weights is not None:
        return _drawn(points, codebook, n, seed, weights, codes=codes)
    placeable = with_direction(points, codebook).nonzero()[:, 0]
    head = max(65_536, 128 * n)
    drawn = among = placeable[:0]
    for more in (placeable[:head], placeable, torch.arange(len(points), device=points.device)):
        if len(drawn) < n and len(more) > len(among):
            among = more
            drawn = among[_drawn(points[among], codebook, n, seed, codes=None if codes is None else codes[among])]
    return drawn


def _drawn(
    points: Tensor, codebook: Codebook, n: int, seed: int, weights: Tensor | None = None, power: float = 2.0,
    codes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As draw_by_error, by a power of the distance, among all points.

    Several points are proposed at a time, by their errors so far, and accepted one after the other with the probability
    that is left of their error by those accepted before. So each is drawn as if it were proposed alone. Source:
    Cohen-Addad, Lattanzi, Norouzi-Fard, Sohler and Svensson 2020, "Fast and Accurate k-means++ via Rejection Sampling".
    """
    errors = squared_errors(points, codebook, nearest(points, codebook) if codes is None else codes)
    emitted = codebook.metric.emit(points)
    random = torch.Generator().manual_seed(seed % 2**63)
    drawn: list[int] = []
    while len(points) and len(drawn) < n:
        costs = errors if power == 2 else errors ** (power / 2)
        up_to = (costs if weights is None else costs * weights.to(costs.device)).cumsum(0)
        if not float(up_to[-1]) > 0:
            break
        at_once = min(_AT_ONCE, 1 + (codebook.size + len(drawn)) // _ONE_IN)
        chances = torch.rand(at_once, 2, generator=random, dtype=torch.float64)
        at = chances[:, 0].to(up_to.device) * up_to[-1]
        proposed = torch.searchsorted(up_to, at, right=True).clamp(max=len(points) - 1)
        left, proposed = errors[proposed], proposed.to(points.device)
        rows = emitted[proposed]
        accepted = _accepted(rows, left, chances[:, 1] ** (2 / power))[: n - len(drawn)]
        drawn += proposed[accepted].tolist()
        if len(accepted):
            new = Codebook(rows[accepted])
            errors = torch.minimum(errors, squared_errors(emitted, new, nearest(emitted, new)))
    return torch.tensor(drawn, dtype=torch.int64, device=points.device)


def _apart(rows: Tensor) -> Tensor:
    """(m, m) float64 squared distances between rows (m, dim) float64; 0 between those that are equal."""
    centered = rows - rows.mean(0)
    squares = centered.square().sum(1)
    both = squares[:, None] + squares
    apart = both - 2 * centered @ centered.T
    return torch.where(apart > _ROUNDED * both, apart, 0.0)


def _accepted(rows: Tensor, errors: Tensor, chances: Tensor) -> Tensor:
    """Indices of the proposed rows (m, dim) that are accepted: what is left of their errors (m,) exceeds a chance (m,).

    errors: to the codes that were there before. At least the first row is accepted.
    """
    apart = _apart(wide(rows)).cpu().numpy()
    left, needed = errors.cpu().numpy().copy(), (errors.cpu() * chances).numpy()
    accepted = []
    for i in range(len(left)):
        if left[i] > needed[i]:
            accepted.append(i)
            np.minimum(left, apart[i], out=left)
    return torch.tensor(accepted, device=rows.device)
