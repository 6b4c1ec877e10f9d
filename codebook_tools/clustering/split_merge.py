"""Split-and-merge moves out of a local optimum of k-means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import squared_errors
from codebook_tools.codebook import Codebook
from codebook_tools.runtime.devices import wide

_AT_ONCE = 1 << 22  # entries of differences of codes at a time
_APART = 0.3  # of the distance to the drawn point, between the two new codes and the old one


@dataclass(frozen=True, eq=False)
class Moves:
    """Codes after moves.

    Attributes:
        vectors: (k, dim), the codes with some of them moved.
        into: (k,) int64, of each code the one that its cell was merged into; itself where it was not moved.
    """

    vectors: Tensor
    into: Tensor


def split_and_merge(
    codebook: Codebook, points: Tensor, codes: Tensor, neighbors: Tensor, count: int, random: torch.Generator,
    weights: Tensor | None = None,
) -> Moves:  # fmt: skip
    """Move codes of cells that are cheap to merge into cells of the largest error, which are split.

    Merging a cell into another costs n₁n₂/(n₁+n₂) times the squared distance of their codes (Equitz 1989). A cell is
    split along the line from its code to one of its points, drawn by squared error. Some iterations of Lloyd must
    follow. Source: Kaukoranta, Fränti and Nevalainen 1998, "Iterative split-and-merge algorithm for VQ codebook
    generation".

    Args:
        codebook: k codes.
        points: (n, dim), what they cluster.
        codes: (n,) int64, the code of each point.
        neighbors: (k, m) int64, codes near each code, that its cell may be merged into.
        count: Most codes to move.
        random: Generator on the CPU.
        weights: (n,) float64, of the points; None for 1.

    Returns:
        The codes, with at most `count` of them moved.
    """
    errors = squared_errors(points, codebook, codes)
    codes = codes.to(errors.device)
    errors = errors if weights is None else errors * weights
    hits = torch.bincount(codes, weights, minlength=codebook.size).double()
    of_cells = errors.new_zeros(codebook.size).index_add_(0, codes, errors)
    costs, partners = _cheapest_merges(codebook.vectors, hits, neighbors)
    moved, cut = (cells.to(points.device) for cells in _pairs(costs, partners, of_cells, count))
    towards = codebook.metric.emit(points[_drawn(codes, errors, cut.to(codes.device), random).to(points.device)])
    step = _APART * (towards - codebook.vectors[cut])
    vectors = codebook.vectors.clone()
    vectors[moved], vectors[cut] = codebook.vectors[cut] + step, codebook.vectors[cut] - step
    return Moves(codebook.metric.emit(vectors), _followed(moved, partners.to(moved.device)))


def _cheapest_merges(vectors: Tensor, hits: Tensor, neighbors: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest cost of merging each cell into a neighbor (k,) float64, and that neighbor (k,) int64.

    An empty cell costs 0 and has itself. vectors: (k, dim), hits: (k,), neighbors: (k, m) int64.
    """
    index = torch.arange(len(vectors), device=hits.device)
    dead = hits == 0
    costs, partners = [], []
    for rows in torch.split(index, max(1, _AT_ONCE // neighbors[:1].numel() // vectors.shape[1])):
        others = neighbors[rows.to(neighbors.device)]
        apart = wide((vectors[rows.to(vectors.device), None] - vectors[others]).square().sum(2))
        others = others.to(hits.device)
        of_both = hits[rows, None] + hits[others]
        pairs = apart * hits[rows, None] * hits[others] / of_both.clamp(min=1)
        pairs[(rows[:, None] == others) | dead[others]] = torch.inf
        least = pairs.min(1)
        costs.append(least.values)
        partners.append(others.gather(1, least.indices[:, None])[:, 0])
    return torch.cat(costs).masked_fill(dead, 0), torch.where(dead, index, torch.cat(partners))


def _followed(moved: Tensor, partners: Tensor) -> Tensor:
    """(k,) int64: the cell that each moved one was merged into, through cells that were moved as well."""
    into = torch.arange(len(partners), device=partners.device)
    into[moved] = partners[moved]
    while not torch.equal(further := into[into], into):
        into = further
    return into


def _pairs(costs: Tensor, partners: Tensor, errors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Codes to move, the cheapest first, and cells to split, of the largest errors first.

    No cell is in both, or twice, or one that a moved code merges into.
    """
    moved, taken = list[int](), set[int]()
    into = partners.tolist()
    for code in costs.argsort(stable=True).tolist():
        if len(moved) == count:
            break
        if code not in taken and costs[code] < torch.inf:
            moved.append(code)
            taken |= {code, into[code]}
    order = errors.argsort(descending=True, stable=True)
    by_error = zip(order.tolist(), errors[order].tolist(), strict=True)
    cut = [cell for cell, error in by_error if cell not in taken and error > 0][: len(moved)]
    pairs = torch.tensor([moved[: len(cut)], cut], dtype=torch.int64, device=costs.device)
    return pairs[0], pairs[1]


def _drawn(codes: Tensor, errors: Tensor, cells: Tensor, random: torch.Generator) -> Tensor:
    """One point of each of the cells (m,), drawn by its error: (m,) int64.

    The largest of log(error) plus Gumbel noise is such a draw. codes: (n,) int64 and errors: (n,) of all points.
    """
    asked = torch.zeros(int(codes.max()) + 1, dtype=torch.bool, device=codes.device)
    asked[cells] = True
    points = asked[codes].nonzero()[:, 0]
    noise = torch.rand(len(points), generator=random, dtype=torch.float64).to(errors.device)
    order = points[(errors[points].log() - (-noise.log()).log()).argsort()]
    places = torch.arange(len(order), device=order.device)
    last = places.new_zeros(len(asked)).scatter_reduce_(0, codes[order], places, "amax")
    return order[last[cells]]
