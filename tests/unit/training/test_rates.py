"""How fast each tensor learns."""

from __future__ import annotations

import pytest
import torch

from codebook_tools.training.learning_rate import relative_rates, usual_rate


def of(size: float, *shape: int) -> torch.Tensor:
    return torch.full(shape, size)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ([of(0.01, 4, 4), of(0.04, 8, 2, 3, 3), of(0.16, 2, 2)], [0.25, 1, 4]),  # in proportion to their size
        ([of(0.05, 4, 4), of(0, 4, 4), of(0, 4), of(1, 4)], [1, 0.105, 0.105, 1]),  # fresh ones slowly, gains at most 1
        ([of(1, 4), of(3, 4)], [1, 1]),  # gains alone
    ],
)
def test_tensors_learn_in_proportion_to_their_size(tensors: list[torch.Tensor], expected: list[float]) -> None:
    assert relative_rates(tensors) == pytest.approx(expected, rel=0.01)


def test_a_layer_that_is_scaled_while_the_next_makes_up_for_it_learns_as_before() -> None:
    plain = relative_rates([of(0.05, 4, 4), of(0.1, 4), of(0.03, 4, 4), of(0.02, 4)])
    scaled = relative_rates([of(0.5, 4, 4), of(1.0, 4), of(0.003, 4, 4), of(0.02, 4)])
    assert [scaled[0] / plain[0], scaled[2] / plain[2]] == pytest.approx([10, 0.1], rel=0.2)
    assert scaled[3] == plain[3]


def test_the_usual_rate_falls_with_depth_and_with_the_roots_of_width_and_of_fewer_images() -> None:
    deep = [of(0.3, 8, 300), of(1.0, 8)] * 10
    assert usual_rate(deep, 64) == pytest.approx(1.25 / 30 / 10)  # entries begin at 1 / sqrt(3 · 300)
    assert usual_rate([of(0.3, 8, 300, 2, 2)] * 20, 64) == pytest.approx(1.25 / 60 / 20)
    assert usual_rate(deep, 16) == pytest.approx(1.25 / 60 / 10)
    assert usual_rate([of(0.3, 8, 12)], 64) == 0.005
    assert usual_rate([of(1.0, 8)], 64) == 1e-3
