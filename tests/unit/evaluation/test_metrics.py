"""Metrics: numbers worked by hand, and parity of SSIM with torchmetrics; contracts/test_twins.py has the others'."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional
from torchmetrics.functional.image import structural_similarity_index_measure

from codebook_tools.evaluation import metrics


@pytest.mark.parametrize(("counts", "used", "used_10", "usage", "perplexity", "top_share"), [
    ([8, 8, 8, 8], 4, 0, 1.0, 4.0, 0.25), ([10, 0, 0, 0], 1, 1, 0.25, 1.0, 1.0), ([0, 0], 0, 0, 0.0, 0.0, 0.0),
    ([], 0, 0, 0.0, 0.0, 0.0),
    ([20, 10, 10, 0], 3, 3, 0.75, 2**1.5, 0.5),  # shares 1/2, 1/4, 1/4: 0.5 * 1 + 2 * 0.25 * 2 bits
    ([9, 3], 2, 0, 1.0, 4 / 3**0.75, 0.75),  # shares 3/4, 1/4: 2 - 0.75 * log2(3) bits
    ([3] * 89 + [0] * 423, 89, 0, 89 / 512, 89.0, 1 / 89),
    ([2**53, 1], 2, 1, 1.0, 1.0, 2**53 / (2**53 + 1)),  # float32 could not tell them, nor their sum, apart
])  # fmt: skip
def test_usage_by_hand(
    counts: list[int], used: int, used_10: int, usage: float, perplexity: float, top_share: float
) -> None:
    row = torch.tensor(counts, dtype=torch.int64)
    assert (metrics.used(row), metrics.used(row, 10), metrics.usage(row)) == (used, used_10, usage)
    assert metrics.perplexity(row) == pytest.approx(perplexity, rel=1e-12)
    assert metrics.bits(row) == pytest.approx(math.log2(perplexity or 1), abs=1e-12)
    assert metrics.top_share(row) == top_share


def test_psnr_by_hand() -> None:
    for mse, decibels in ((1.0, 0.0), (0.001, 30.0), (4.0, -6.020599913279624), (0.0, math.inf)):
        assert metrics.psnr(mse) == pytest.approx(decibels, abs=1e-12)
    assert math.isnan(metrics.psnr(math.nan))


@pytest.mark.parametrize(("noise", "shape"), [
    (0.3, (5, 1, 11, 11)), (0.0, (2, 3, 32, 32)), (0.3, (2, 3, 33, 64)), (1e-4, (1, 2, 65, 31)), (0.3, (1, 1, 200, 12)),
])  # fmt: skip
def test_ssim_is_what_torchmetrics_computes_in_float64(noise: float, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(shape[-1])
    images = torch.rand(shape, generator=generator)
    others = (images + noise * torch.randn(shape, generator=generator)).clamp(0, 1)
    settings = {"data_range": 1.0, "reduction": "none", "sigma": 1.5}
    scores = metrics.ssim(images, others)
    expected = structural_similarity_index_measure(others.double(), images.double(), **settings)
    assert scores is not None and isinstance(expected, torch.Tensor)
    assert torch.allclose(scores, expected, rtol=1e-12, atol=0)


def test_ssim_of_black_and_white_is_the_luminance_term_alone() -> None:
    """Flat images have no variance: (2ab + C1) / (a² + b² + C1), with C1 = 0.01², a = 0 and b = 1."""
    scores = metrics.ssim(torch.zeros(2, 3, 16, 16), torch.ones(2, 3, 16, 16))
    assert scores is not None and scores.tolist() == pytest.approx([1e-4 / (1 + 1e-4)] * 2, rel=1e-9)


def test_images_too_small_for_a_window_have_no_ssim_and_without_inner_pixels_no_detail() -> None:
    assert [metrics.ssim(torch.zeros(2, 3, *sides), torch.zeros(2, 3, *sides)) for sides in ((10, 11), (11, 10))] == [
        None
    ] * 2
    assert [metrics.detail(torch.zeros(1, 1, *sides)) for sides in ((2, 9), (9, 2))] == [None] * 2


def detail(images: torch.Tensor) -> list[float]:
    energies = metrics.detail(images)
    assert energies is not None and energies.dtype == torch.float64
    return energies.tolist()


def test_detail_by_hand() -> None:
    point, edge = torch.zeros(1, 1, 5, 5), torch.zeros(1, 2, 4, 6)
    point[0, 0, 2, 2] = 0.5
    edge[..., 3:] = 1
    slope = (torch.arange(8.0)[:, None] + torch.arange(8.0)).expand(1, 3, 8, 8)
    assert detail(point) == [4 * 0.5**2 + (4 * 0.5) ** 2]  # its four neighbors, and itself
    assert detail(edge) == [2 * 2 * 2 * 1.0]  # two channels, two inner rows, both sides of the edge
    assert detail(slope) == [0.0]
    board = (torch.arange(20)[:, None] + torch.arange(20)).remainder(2).float()[None, None]
    assert detail(board) == [18**2 * 4.0**2]
    assert detail(functional.avg_pool2d(board, 3, 1)) == pytest.approx([16**2 * (4 / 9) ** 2], rel=1e-5)
