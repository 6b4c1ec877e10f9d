"""The entropy term: numbers by hand, no scale, and what it does to a model."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from runs import tune
from sources_of_images import Images
from torch import Tensor

from codebook_tools.clustering.metric import COSINE, DOT
from codebook_tools.codebook import EUCLIDEAN
from codebook_tools.errors import CodebookError
from codebook_tools.models.model import Model
from codebook_tools.training.losses import entropy
from codebook_tools.training.losses.entropy import indecision
from codebook_tools.training.losses.objective import objective_of
from codebook_tools.training.recipe import FineTune

QUARTERS = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
"""The entropy of (3/4, 1/4) in bits."""


def of(rows: list[float], codes: list[float]) -> float:
    columns = (torch.tensor(values, dtype=torch.float32)[:, None] for values in (rows, codes))
    return float(indecision(*columns, EUCLIDEAN))


def test_sure_latents_count_by_how_evenly_they_choose() -> None:
    assert of([-0.9, 0.9], [-1, 1]) == pytest.approx(-1, abs=1e-4)
    assert of([-0.9, -1.1, -0.9, 0.9], [-1, 1]) == pytest.approx(-QUARTERS, abs=1e-4)
    assert of([0.9, 1.1], [-1, 1]) == pytest.approx(0, abs=1e-4)


def test_undecided_latents_do_not_count_as_spread() -> None:
    assert of([0.0, 0.0], [-1, 1]) == pytest.approx(0, abs=1e-6)
    # 4 x = 0.3 log 3 (1 - x)^2: the other code is farther by log 3 times 0.3 of the distance, so a third as likely.
    b, c = 2 + 4 / (0.3 * math.log(3)), 1.0
    x = (b - math.sqrt(b * b - 4 * c)) / 2
    assert of([-x, x], [-1, 1]) == pytest.approx(QUARTERS - 1, abs=1e-3)


def test_one_code_leaves_no_choice_and_latents_on_their_codes_no_doubt() -> None:
    rows = torch.ones(3, 2, requires_grad=True)
    assert float(indecision(rows, torch.zeros(1, 2), EUCLIDEAN)) == 0
    for codes in (torch.eye(2), torch.ones(2, 2)):
        on_codes = codes.clone().requires_grad_(True)
        loss = indecision(on_codes, codes, EUCLIDEAN)
        torch.autograd.backward(loss)
        assert on_codes.grad is not None and on_codes.grad.isfinite().all()
        assert float(loss.detach()) == pytest.approx(-1 if codes[0, 1] == 0 else 0, abs=1e-4)


@pytest.fixture
def rows() -> Tensor:
    return torch.randn(200, 3, generator=torch.Generator().manual_seed(0))


def test_no_scale(rows: Tensor) -> None:
    small, large = rows.clone().requires_grad_(True), (10 * rows).requires_grad_(True)
    values = [indecision(x, scale * rows[:9] + scale, EUCLIDEAN) for x, scale in ((small, 1), (large, 10))]
    torch.autograd.backward(values)
    torch.testing.assert_close(values[0], values[1])
    assert small.grad is not None and large.grad is not None
    torch.testing.assert_close(small.grad, 10 * large.grad)


def test_by_the_cosine_lengths_do_not_matter(rows: Tensor) -> None:
    lengths = torch.rand(200, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    found = [indecision(x, rows[:9] * lengths[:9], COSINE) for x in (rows[9:], rows[9:] * lengths[9:])]
    torch.testing.assert_close(found[0], found[1])


def test_following_it_spreads_latents_over_codes(rows: Tensor) -> None:
    codes = rows[:16] * 2
    latents = (0.3 * rows).requires_grad_(True)

    def in_use() -> int:
        return len(torch.cdist(latents.detach(), codes).argmin(1).bincount().nonzero())

    before, optimiser = in_use(), torch.optim.Adam([latents], lr=0.05)
    for _ in range(100):
        optimiser.zero_grad()
        torch.autograd.backward(indecision(latents, codes, EUCLIDEAN))
        optimiser.step()
    assert before <= 6 and in_use() >= 9


def test_of_many_latents_some_count(rows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = rows[:4]
    expected = indecision(rows[::3], codes, EUCLIDEAN)
    monkeypatch.setattr(entropy, "_AT_MOST", 4 * 80)  # 200 rows are 800 distances
    torch.testing.assert_close(indecision(rows, codes, EUCLIDEAN), expected)


def test_a_recipe_weighs_it(line: Callable[..., Model], grey_images: Callable[..., Images]) -> None:
    """Pixels of 0.2 and 0.8 are sure of their codes, and choose both alike."""
    images = grey_images([[0.2, 0.8], [0.2, 0.8]])
    losses = [
        tune(line([0.2001, 0.8001]), images, [1, 1], steps=1, train="all", entropy=weight, batch_size=1).trace[1].loss
        for weight in (0.0, 0.5)
    ]
    assert losses[0] is not None and losses[1] == pytest.approx(losses[0] - 0.5, abs=1e-3)


def test_inner_products_are_no_distances(line: Callable[..., Model], grey_images: Callable[..., Images]) -> None:
    model, images = line([0.2, 0.8]), grey_images([[0.2, 0.8], [0.2, 0.8]])
    model.books[0].metric = DOT
    with pytest.raises(CodebookError, match="--entropy goes by distances"):
        objective_of(model, images, FineTune(entropy=0.1), next(images.batches(1))[1], seed=0)
