"""The entropy term: numbers by hand, no scale, and what it does to a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from points import normal
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

# 4 x = 0.3 log 3 (1 - x)^2: the other code is farther by log 3 times 0.3 of the distance, so a third as likely.
B = 2 + 4 / (0.3 * math.log(3))
THIRD = (B - math.sqrt(B * B - 4)) / 2


@pytest.mark.parametrize(
    ("rows", "codes", "expected"),
    [
        ([-0.9, 0.9], [-1, 1], -1),  # sure latents count by how evenly they choose
        ([-0.9, -1.1, -0.9, 0.9], [-1, 1], -QUARTERS),
        ([0.9, 1.1], [-1, 1], 0),
        ([0, 0], [-1, 1], 0),  # undecided latents do not count as spread
        ([-THIRD, THIRD], [-1, 1], QUARTERS - 1),
        ([-1, 1], [-1, 1], -1),  # latents on their codes
        ([1, 1], [1, 1], 0),
        ([1, 1, 1], [0], 0),  # one code leaves no choice
    ],
)
def test_the_term_by_hand(rows: list[float], codes: list[float], expected: float) -> None:
    latents = torch.tensor(rows, dtype=torch.float32)[:, None].requires_grad_()
    loss = indecision(latents, torch.tensor(codes, dtype=torch.float32)[:, None], EUCLIDEAN)
    assert loss.item() == pytest.approx(expected, abs=1e-3)
    if len(codes) > 1:
        torch.autograd.backward(loss)
        assert latents.grad is not None and latents.grad.isfinite().all()


@pytest.fixture
def rows() -> Tensor:
    return normal(200, 3)


def test_no_scale_matters_and_by_cosine_no_length(rows: Tensor) -> None:
    small, large = rows.clone().requires_grad_(True), (10 * rows).requires_grad_(True)
    values = [indecision(x, scale * rows[:9] + scale, EUCLIDEAN) for x, scale in ((small, 1), (large, 10))]
    torch.autograd.backward(values)
    assert small.grad is not None and large.grad is not None
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(small.grad, 10 * large.grad)
    lengths = normal(200, 1, seed=1).abs() + 0.5
    values = [indecision(x, rows[:9] * lengths[:9], COSINE) for x in (rows[9:], rows[9:] * lengths[9:])]
    torch.testing.assert_close(values[0], values[1])


def test_of_many_latents_some_count(rows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = rows[:4]
    expected = indecision(rows[::3], codes, EUCLIDEAN)
    monkeypatch.setattr(entropy, "_AT_MOST", 4 * 80)  # 200 rows are 800 distances
    torch.testing.assert_close(indecision(rows, codes, EUCLIDEAN), expected)


def test_a_recipe_weighs_it(tuned: Callable[..., tuple[Model, Any]]) -> None:
    """Pixels of 0.2 and 0.8 are sure of their codes, and choose both alike."""
    plain, weighed = (
        tuned([0.2001, 0.8001], [1, 1], [[0.2, 0.8], [0.2, 0.8]], steps=1, entropy=weight)[1].trace[1].loss
        for weight in (0.0, 0.5)
    )
    assert weighed == pytest.approx(plain - 0.5, abs=1e-3)


def test_inner_products_are_no_distances(line: Callable[..., Model], grey_images: Callable[..., Images]) -> None:
    model, images = line([0.2, 0.8]), grey_images([[0.2, 0.8], [0.2, 0.8]])
    model.books[0].metric = DOT
    with pytest.raises(CodebookError, match="--entropy goes by distances"):
        objective_of(model, images, FineTune(entropy=0.1), next(images.batches(1))[1], seed=0)
