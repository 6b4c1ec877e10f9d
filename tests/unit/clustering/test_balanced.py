"""Balanced k-means: medians in place of means, and codes of even use on data that it has not met."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from points import column
from torch import Tensor

from codebook_tools.clustering.assignment import nearest
from codebook_tools.clustering.balanced import BALANCED, Emphasis
from codebook_tools.clustering.kmeans import kmeans
from codebook_tools.clustering.metric import COSINE_UNIT
from codebook_tools.codebook import EUCLIDEAN, Codebook, Metric
from codebook_tools.data.latents import StoredLatents
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.metrics import perplexity
from codebook_tools.models.model import Model
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import Refit
from codebook_tools.training.codebook_ema import CodebookEMA


def test_weights_make_powers_of_squares_above_a_floor() -> None:
    errors = torch.tensor([0.0, 1e-9, 4.0, 16.0, 100.0])
    emphasis = Emphasis.of(errors, 1.0)
    torch.testing.assert_close((emphasis.weights(errors) * errors)[2:], torch.tensor([2.0, 4.0, 10.0]))
    assert emphasis.floor == pytest.approx(0.05**2 * 4) and torch.equal(*emphasis.weights(errors)[:2])
    copies = torch.tensor([0.0, 0.0, 0.0, 4.0])
    assert Emphasis.of(copies, 1.0).floor == pytest.approx(0.05**2 * 1) and Emphasis.of(copies[:3], 1.0).floor > 0


@pytest.mark.parametrize(("points", "median"), [((0, 1, 2, 3, 100), 2.0), ((0, 0, 0, 5, 9), 0.0)])
def test_one_balanced_code_is_the_median(points: tuple[float, ...], median: float) -> None:
    found = kmeans(column(*points), 1, power=1.0, watch=Watch())
    assert float(found.centroids) == pytest.approx(median, abs=0.06)
    assert found.inertia == pytest.approx(sum(abs(x - median) for x in points), rel=0.01)


def crowds(n: int, seed: int) -> Tensor:
    """(n, 8): crowds of unlike size and width, with heavy tails."""
    random = torch.Generator().manual_seed(0)
    centers, widths = 4 * torch.randn(40, 8, generator=random), torch.rand(40, generator=random).square()
    random.manual_seed(seed)
    of = torch.multinomial(1 / torch.arange(1.0, 41), n, True, generator=random)
    tails = torch.randn(n, 3, generator=random).square().mean(1, keepdim=True).sqrt()
    return centers[of] + widths[of, None] * torch.randn(n, 8, generator=random) / tails


def figures(points: Tensor, codes: Tensor, metric: Metric) -> tuple[float, float]:
    """Perplexity, and the largest cell relative to the mean one."""
    counts = torch.bincount(nearest(points, Codebook(codes, metric)), minlength=len(codes))
    return perplexity(counts), float(counts.max() / counts.double().mean())


@pytest.mark.parametrize("metric", [EUCLIDEAN, COSINE_UNIT], ids=lambda metric: metric.name)
def test_nearest_codes_of_new_data_are_used_more_evenly(metric: Metric) -> None:
    points, new = crowds(4000, 1), crowds(4000, 2)
    plain, balanced = (kmeans(points, 64, power=power, metric=metric, watch=Watch()) for power in (2.0, BALANCED))
    (spread, largest), (more, smaller) = (figures(new, each.centroids, metric) for each in (plain, balanced))
    assert more > 1.1 * spread and smaller < largest
    again = kmeans(points, 64, power=BALANCED, metric=metric, watch=Watch())
    assert torch.equal(again.centroids, balanced.centroids)


def test_refit_balances_by_the_native_engine_alone() -> None:
    points = crowds(2000, 3)
    old, counts = Codebook(points[:8].clone()), torch.ones(8).long()
    plain, balanced = (Refit(16, balance=balance)(old, StoredLatents(points), counts) for balance in (False, True))
    assert (plain.power, balanced.power) == (2.0, BALANCED)
    expected = kmeans(points, 16, power=BALANCED, watch=Watch()).centroids
    assert torch.equal(balanced.codebook.vectors, expected)
    with pytest.raises(CodebookError, match=r"engine=faiss .* --engine native"):
        Refit(16, balance=True, engine="faiss")


@pytest.mark.parametrize(("power", "settled"), [(2.0, 1.8), (BALANCED, 0.0)])
def test_a_balanced_code_stays_at_the_median_while_training(
    line: Callable[..., Model], power: float, settled: float
) -> None:
    model = line([0.0, 1.0])
    model.books[0].vectors = torch.tensor([[0.2, 0.0], [50.0, 0.0]])
    ours = CodebookEMA(model, 0, torch.tensor([5, 5]), True, torch.Generator(), power)
    batch = torch.tensor([[0.0, 0.0]] * 3 + [[1.0, 0.0], [8.0, 0.0]] + [[50.0, 0.0]] * 5)
    codes = torch.tensor([0] * 5 + [1] * 5)
    for _ in range(300):
        ours.update(batch, codes, revive=False)
    assert model.books[0].vectors[:, 0].tolist() == pytest.approx([settled, 50], abs=0.1)
    assert ours.usage.tolist() == pytest.approx([0.5, 0.5])
    again = CodebookEMA(model, 0, torch.tensor([5, 5]), True, torch.Generator(), power)
    again.load({name: tensor.clone() for name, tensor in ours.state().items()})
    for each in (ours, again):
        model.books[0].vectors = torch.tensor([[3.0, 0.0], [50.0, 0.0]])
        each.update(batch, codes, revive=True)
    assert torch.equal(ours.mass, again.mass) and torch.equal(ours.sums, again.sums)
