"""Split-and-merge moves out of a local optimum of k-means."""

from __future__ import annotations

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import nearest, squared_errors
from codebook_tools.codebook import Codebook
from codebook_tools.runtime.devices import wide

_AT_ONCE = 1 << 22  # costs of merging that are computed at a time
_APART = 0.3  # of the distance to the drawn point, between the two new codes and the old one


def split_and_merge(
    codebook: Codebook, points: Tensor, count: int, random: torch.Generator, weights: Tensor | None = None
) -> Tensor:
    """Move codes of cells that are cheap to merge into cells of the largest error, which are split.

    Merging a cell into another costs n₁n₂/(n₁+n₂) times the squared distance of their codes (Equitz 1989). A cell is
    split along the line from its code to one of its points, drawn by squared error. Some iterations of Lloyd must
    follow. Source: Kaukoranta, Fränti and Nevalainen 1998, "Iterative split-and-merge algorithm for VQ codebook
    generation".

    Args:
        codebook: k codes.
        points: (n, dim), what they cluster.
        count: Most codes to move.
        random: Generator on the CPU.
        weights: (n,) float64, of the points; None for 1.

    Returns:
        (k, dim), the codes with at most `count` of them moved.
    """
    codes = nearest(points, codebook)
    errors = squared_errors(points, codebook, codes)
    codes = codes.to(errors.device)
    errors = errors if weights is None else errors * weights
    hits = torch.bincount(codes, weights, minlength=codebook.size).double()
    of_cells = errors.new_zeros(codebook.size).index_add_(0, codes, errors)
    pairs = _pairs(*_cheapest_merges(wide(codebook.vectors), hits), of_cells, count)
    moved, cut = (cells.to(points.device) for cells in pairs)
    towards = codebook.metric.emit(points[_drawn(codes, errors, codebook.size, random).to(points.device)[cut]])
    step = _APART * (towards - codebook.vectors[cut])
    vectors = codebook.vectors.clone()
    vectors[moved], vectors[cut] = codebook.vectors[cut] + step, codebook.vectors[cut] - step
    return codebook.metric.emit(vectors)


def _cheapest_merges(vectors: Tensor, hits: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest cost of merging each cell into another (k,) float64, and that other cell (k,) int64.

    An empty cell costs 0 and has itself. vectors: (k, dim) float64, hits: (k,).
    """
    index = torch.arange(len(vectors), device=vectors.device)
    dead = hits == 0
    costs, partners = [], []
    for rows in torch.split(index, max(1, _AT_ONCE // len(index))):
        both = hits[rows, None] + hits
        pairs = torch.cdist(vectors[rows], vectors).square_().mul_(hits[rows, None] * hits / both.clamp(min=1))
        pairs[(rows[:, None] == index) | dead] = torch.inf
        least = pairs.min(1)
        costs.append(least.values)
        partners.append(least.indices)
    return torch.cat(costs).masked_fill(dead, 0), torch.where(dead, index, torch.cat(partners))


def _pairs(costs: Tensor, partners: Tensor, errors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Codes to move, the cheapest first, and cells to split, of the largest errors first.

    No cell is in both, or twice, or one that a moved code merges into.
    """
    moved, taken = list[int](), set[int]()
    into = partners.tolist()
    for code in costs.argsort(stable=True).tolist():
        if len(moved) == count:
            break
        if code not in taken:
            moved.append(code)
            taken |= {code, into[code]}
    order = errors.argsort(descending=True, stable=True)
    by_error = zip(order.tolist(), errors[order].tolist(), strict=True)
    cut = [cell for cell, error in by_error if cell not in taken and error > 0][: len(moved)]
    pairs = torch.tensor([moved[: len(cut)], cut], dtype=torch.int64, device=costs.device)
    return pairs[0], pairs[1]


def _drawn(codes: Tensor, errors: Tensor, size: int, random: torch.Generator) -> Tensor:
    """(size,) int64: one point of each cell, drawn by its error; the first in the order for a cell without points.

    The largest of log(error) plus Gumbel noise is such a draw.
    """
    noise = torch.rand(len(codes), generator=random, dtype=torch.float64).to(errors.device)
    order = (errors.log() - (-noise.log()).log()).argsort()
    places = torch.arange(len(order), device=order.device)
    last = places.new_zeros(size).scatter_reduce_(0, codes[order], places, "amax")
    return order[last]
