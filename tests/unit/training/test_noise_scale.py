"""How far gradients agree, worked by hand, and the learning rate that follows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import weights_of
from sources_of_images import Images, find_images
from torch import Tensor, nn

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.models.load import load_model
from codebook_tools.training.finetune import FineTune
from codebook_tools.training.noise_scale import gradient_agreement, rate_factor
from codebook_tools.training.trainer import Trainer


@pytest.fixture
def trainer(tiny: Path, images_folder: Path) -> Callable[..., Trainer]:
    def make(**recipe: Any) -> Trainer:
        model = load_model(read_checkpoint(tiny))
        images = Images(find_images([images_folder])[:32], 3, 4)
        return Trainer(model, images, FineTune(**{"batch_size": 4, **recipe}), [torch.ones(16)], 0, {}, {})

    return make


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([[2.0, 0.0], [1.0, 1.0]], 4 / 6),  # two pairs with product 2, of squares 4 and 2
        ([[1.0, 0.0], [0.0, 1.0]], 0.0),
        ([[1.0, 0.0], [-1.0, 0.0]], 0.0),  # the estimate, -1, is no part of anything
        ([[3.0, 1.0]] * 5, 1.0),
        ([[0.0, 0.0]] * 2, 1.0),
        ([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], 1 / 3),  # one pair of three
    ],
)
def test_agreement_by_hand(batches: list[list[float]], expected: float) -> None:
    assert gradient_agreement([torch.tensor(batch)] for batch in batches) == pytest.approx(expected)


def test_agreement_is_the_mean_over_tensors_whatever_their_scale() -> None:
    first, second = ([2.0, 0.0], [1.0, 1.0]), ([5.0], [5.0])

    def agreement(scale: float) -> float:
        return gradient_agreement(
            [scale * torch.tensor(a), torch.tensor(b)] for a, b in zip(first, second, strict=True)
        )

    assert agreement(1.0) == pytest.approx(agreement(1e-12)) == pytest.approx((4 / 6 + 1) / 2)


@pytest.mark.parametrize("batches", [2, 8, 30])
def test_agreement_does_not_depend_on_the_number_of_batches(batches: int) -> None:
    """Of a signal of length 1 in noise of variance 1 / 4 in each of 4 dimensions it is a half: over many draws."""
    random, signal = torch.Generator().manual_seed(0), torch.tensor([1.0, 0.0, 0.0, 0.0])
    total = squares = 0.0
    for _ in range(2000):
        drawn = signal + torch.randn(batches, 4, generator=random) / 2
        square = float(drawn.square().sum()) / batches
        total += gradient_agreement([row] for row in drawn) * square
        squares += square
    assert total / squares == pytest.approx(0.5, abs=0.03 if batches > 2 else 0.12)  # of two, many are cut off at 0


@pytest.mark.parametrize(
    ("agreement", "factor"), [(1.0, 1.0), (0.72, 1.0), (0.5, 2**-1.25), (0.3, 2**-2.5), (0.2, 1 / 8), (0.0, 1 / 8)]
)
def test_the_rate_falls_with_the_noise_where_that_is_above_two_fifths_of_the_signal(
    agreement: float, factor: float
) -> None:
    assert rate_factor(agreement) == pytest.approx(factor)


def as_if(trainer: Trainer, batches: list[list[float]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel gets the first of its entries' gradients by turns from these."""
    coming, real = iter(batches * 100), trainer.gradients

    def gradients() -> dict[str, Tensor]:
        terms, own = real(), next(coming)
        for parameter in trainer.parameters:
            parameter.grad = torch.zeros_like(parameter)
            parameter.grad.view(-1)[:2] = torch.tensor(own)
        return terms

    monkeypatch.setattr(trainer, "gradients", gradients)


def test_a_lower_rate_is_settled_and_nothing_else_is_touched(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, other = trainer(), trainer()
    for each in (made, other):  # what a forward pass changes, and what it draws
        each.model.network._encoder.register_module("norm", nn.BatchNorm2d(3))
        each.model.network._encoder.register_forward_pre_hook(
            lambda module, inputs: (nn.functional.dropout(module.norm(inputs[0]), 0.1),)
        )
    as_if(made, [[1.0, 0.0], [0.0, 1.0]], monkeypatch)  # half of all pairs agree, but for those with themselves: 3 of 7
    usual, before = made.lr, weights_of(made.model)
    torch.manual_seed(5)
    made.settle_rate()
    assert made.lr == usual * rate_factor(3 / 7) < usual / 2
    assert all(tensor.equal(before[name]) for name, tensor in weights_of(made.model).items())
    assert not made.batches.drawn
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.rand(3).equal(drawn)
    monkeypatch.undo()
    torch.manual_seed(5)
    first = made.gradients()
    torch.manual_seed(5)
    assert all(term.equal(first[name]) for name, term in other.gradients().items())


@pytest.mark.parametrize(
    "recipe",
    [{"lr": 0.01}, {"train": "none", "codebook_update": "gradient"}, {"train": "none"}, {"adversarial": True}],
    ids=str,
)
def test_no_batch_is_compared_where_the_rate_stays(
    recipe: dict[str, Any], trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(**recipe)
    monkeypatch.setattr(made, "gradients", lambda: pytest.fail("a batch was compared"))
    usual = made.lr
    made.settle_rate()
    assert made.lr == usual


def test_a_resumed_run_has_the_settled_rate(trainer: Callable[..., Trainer]) -> None:
    made, resumed = trainer(), trainer()
    made.lr /= 3
    resumed.load(made.state())
    assert resumed.lr == made.lr
