"""One contract for all metrics: which code a latent gets and what is emitted, against numpy in float64."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from points import blobs, normal
from torch import Tensor

from codebook_tools.clustering.assignment import nearest, squared_errors
from codebook_tools.clustering.cells import Cells
from codebook_tools.clustering.metric import METRICS, prepared
from codebook_tools.codebook import METRIC_NAMES, Codebook

Rows = NDArray[np.float64]


def directions(rows: Rows) -> Rows:
    return rows / np.maximum(np.sqrt((rows * rows).sum(1, keepdims=True)), 1e-12)


def distances(rows: Rows, codes: Rows) -> Rows:
    return (rows * rows).sum(1)[:, None] - 2 * rows @ codes.T + (codes * codes).sum(1)


def products(rows: Rows, codes: Rows) -> Rows:
    return -rows @ codes.T


@dataclass(frozen=True)
class Meaning:
    """scores: (n, size) of two sets of rows, lower is nearer. free: which of CHANGES leave every assignment."""

    scores: Callable[[Rows, Rows], Rows]
    free: set[str]
    emit: Callable[[Rows], Rows] = lambda rows: rows
    has_means: bool = True


POWERS = 2.0 ** (torch.arange(400) % 7 - 3)[:, None]
"""By which float32 multiplies without rounding."""
CHANGES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "a scale of both": lambda latents, codes: (latents * 8, codes * 8),
    "axes in another order": lambda latents, codes: (latents.flip(1), codes.flip(1)),
    "a shift of both": lambda latents, codes: (latents + 4, codes + 4),
    "a scale for each latent": lambda latents, codes: (latents * POWERS, codes),
    "a scale for each code": lambda latents, codes: (latents, codes * POWERS[: len(codes)]),
}
ALWAYS = {"a scale of both", "axes in another order"}
BY_ANGLE = ALWAYS | {"a scale for each latent", "a scale for each code"}
MEANINGS = {
    "euclidean": Meaning(distances, ALWAYS | {"a shift of both"}),
    "cosine": Meaning(lambda rows, codes: products(directions(rows), directions(codes)), BY_ANGLE),
    "cosine-unit": Meaning(lambda rows, codes: distances(directions(rows), directions(codes)), BY_ANGLE, directions),
    "dot": Meaning(products, ALWAYS | {"a scale for each latent"}, has_means=False),
}
each_metric = pytest.mark.parametrize("name", MEANINGS)


def brute_force(name: str, latents: Tensor, codes: Tensor) -> NDArray[np.int64]:
    return MEANINGS[name].scores(latents.double().numpy(), codes.double().numpy()).argmin(1)  # the lower of equals


def error_of(name: str, points: Tensor, codes: Tensor, cells: Tensor) -> float:
    emitted, means = (MEANINGS[name].emit(rows.double().numpy()) for rows in (points, codes))
    return float(((emitted - means[cells.numpy()]) ** 2).sum())


def test_every_metric_has_a_meaning_to_be_tested_with_and_reaches_other_processes_whole() -> None:
    assert tuple(MEANINGS) == tuple(METRICS) == METRIC_NAMES == tuple(metric.name for metric in METRICS.values())
    assert all(pickle.loads(pickle.dumps(metric)) == metric for metric in METRICS.values())


@each_metric
@pytest.mark.parametrize("count", [0, 1500])
def test_a_latent_gets_the_code_of_brute_force_among_prepared_codes_too(name: str, count: int) -> None:
    for size, dim in ((1, 3), (2, 1), (64, 3), (33, 17), (300, 64), (5, 257)):
        codes, latents = normal(size, dim, seed=1), normal(count, dim, seed=2)
        codebook, before = Codebook(codes, METRICS[name]), (codes.clone(), latents.clone())
        chosen = nearest(latents, codebook)
        assert chosen.dtype == torch.int64 and chosen.tolist() == brute_force(name, latents, codes).tolist()
        assert torch.equal(nearest(METRICS[name].prepare(latents), prepared(codebook)), chosen)
        assert torch.equal(codes, before[0]) and torch.equal(latents, before[1])


@each_metric
def test_ties_go_to_the_lower_code(name: str) -> None:
    for size, dim in ((2, 257), (3, 5), (5, 64), (7, 1), (13, 33), (33, 16)):
        codes, latents = normal(size, dim, seed=1), normal(60, dim, seed=2)
        alone = nearest(latents, Codebook(codes, METRICS[name]))
        assert torch.equal(nearest(latents, Codebook(codes.repeat(3, 1), METRICS[name])), alone)
        longer = torch.cat([codes, codes * 4])
        assert torch.equal(nearest(latents, Codebook(longer, METRICS[name])), alone) or name in ("euclidean", "dot")


@each_metric
@pytest.mark.parametrize("change", CHANGES)
def test_an_assignment_is_free_of_what_the_metric_is_free_of_and_of_nothing_else(name: str, change: str) -> None:
    latents, codes = (normal(n, 5, seed=n).mul(64).round() / 64 for n in (400, 30))  # a shift by 4 rounds none of them
    pairs = ((latents, codes), CHANGES[change](latents, codes))
    plain, changed = (nearest(rows, Codebook(vectors, METRICS[name])) for rows, vectors in pairs)
    assert torch.equal(plain, changed) == (change in MEANINGS[name].free)


@each_metric
def test_what_is_emitted_has_the_metrics_norm_and_errors_run_to_it(name: str) -> None:
    codes, latents = normal(30, 5, seed=1) * torch.linspace(0.1, 9, 30)[:, None], normal(400, 5, seed=2)
    codebook = Codebook(codes, METRICS[name])
    emitted, chosen = MEANINGS[name].emit(codes.double().numpy()), nearest(latents, codebook)
    np.testing.assert_allclose(codebook.emitted.numpy(), emitted, rtol=1e-6)
    assert codebook.metric.has_unit_rows == bool(np.allclose((emitted**2).sum(1), 1))
    errors = squared_errors(latents, codebook, chosen)
    assert errors.dtype == torch.float64
    assert float(errors.sum()) == pytest.approx(error_of(name, latents, codes, chosen), rel=1e-6)


@pytest.mark.parametrize("name", [name for name, meaning in MEANINGS.items() if meaning.has_means])
def test_a_centroid_step_lowers_the_error_of_its_cells_and_moves_no_code_without_a_cell(name: str) -> None:
    points, idle = blobs(1100, 9, 5) * normal(1100, 1, seed=1).abs(), -99 * torch.ones(1, 5)
    codes = torch.cat([points[:9], idle if name == "euclidean" else points[:1]])  # of equal codes the last gets none
    for step in range(6):
        codebook = Codebook(codes, METRICS[name])
        cells, sums = nearest(points, codebook), Cells.over([(part, None) for part in points.split(300)], codebook)
        codes = sums.means(codebook)
        before, after = (error_of(name, points, rows, cells) for rows in (codebook.vectors, codes))
        assert after <= before * (1 + 1e-6) and (step or after < 0.99 * before)
        assert sums.inertia(codes) == pytest.approx(after, rel=1e-4)
        empty = torch.bincount(cells, minlength=10) == 0
        assert torch.equal(codes[empty], codebook.emitted[empty]) and (step or empty[9])


@each_metric
def test_rows_without_length_or_not_finite_get_some_code_and_disturb_no_other(name: str) -> None:
    codes, latents = torch.cat([torch.zeros(1, 3), normal(7, 3, seed=1)]), normal(40, 3, seed=2)
    odd = torch.tensor([[0.0] * 3, [torch.nan, 0, 0], [torch.inf, 0, 0], [1e-30] * 3, [0, -torch.inf, torch.nan]])
    codebook = Codebook(codes, METRICS[name])
    mixed = nearest(torch.cat([latents[:20], odd, latents[20:]]), codebook)
    assert torch.equal(torch.cat([mixed[:20], mixed[25:]]), nearest(latents, codebook))
    assert mixed[20] == 0 and bool(((mixed >= 0) & (mixed < 8)).all())  # the code at zero is a zero's own
    assert bool(codebook.emitted.isfinite().all()) and not codebook.emitted[0].any()
    assert bool(squared_errors(torch.cat([latents, odd[[0, 3]]]), codebook, torch.arange(42) % 8).isfinite().all())
