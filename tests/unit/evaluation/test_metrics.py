"""Metrics: numbers worked by hand, and parity with scipy and scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import structural_similarity_index_measure

from codebook_tools.evaluation import metrics

COUNTS = st.lists(st.integers(0, 2**40), min_size=1, max_size=60).map(lambda row: torch.tensor(row, dtype=torch.int64))


# --- usage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "used", "used_10", "usage", "bits", "perplexity", "top_share"),
    [
        ([8, 8, 8, 8], 4, 0, 1.0, 2.0, 4.0, 0.25),
        ([10, 0, 0, 0], 1, 1, 0.25, 0.0, 1.0, 1.0),
        ([0, 0], 0, 0, 0.0, 0.0, 0.0, 0.0),
        ([5], 1, 0, 1.0, 0.0, 1.0, 1.0),
        # shares 1/2, 1/4, 1/4: 0.5 * 1 + 2 * 0.25 * 2 bits
        ([20, 10, 10, 0], 3, 3, 0.75, 1.5, 2**1.5, 0.5),
        # shares 3/4, 1/4: 2 - 0.75 * log2(3) bits
        ([9, 3], 2, 0, 1.0, 2 - 0.75 * math.log2(3), 4 / 3**0.75, 0.75),
    ],
)
def test_usage_numbers_worked_by_hand(
    counts: list[int], used: int, used_10: int, usage: float, bits: float, perplexity: float, top_share: float
) -> None:
    row = torch.tensor(counts)
    assert (metrics.used(row), metrics.used(row, 10), metrics.usage(row)) == (used, used_10, usage)
    assert metrics.bits(row) == pytest.approx(bits, abs=1e-12)
    assert metrics.perplexity(row) == pytest.approx(perplexity, rel=1e-12)
    assert metrics.top_share(row) == top_share


def test_the_story_of_89_of_512_codes_is_a_usage_of_17_38_percent() -> None:
    counts = torch.zeros(512, dtype=torch.int64)
    counts[:89] = 3
    assert round(metrics.usage(counts), 4) == 0.1738
    assert metrics.perplexity(counts) == pytest.approx(89, rel=1e-12)


def test_an_empty_codebook_has_no_usage() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    assert (metrics.used(empty), metrics.usage(empty), metrics.bits(empty), metrics.perplexity(empty)) == (0, 0, 0, 0)
    assert metrics.top_share(empty) == 0.0


@given(COUNTS)
def test_entropy_and_perplexity_equal_scipys(counts: torch.Tensor) -> None:
    if int(counts.sum()) == 0:
        assert metrics.bits(counts) == metrics.perplexity(counts) == 0.0
        return
    assert metrics.bits(counts) == pytest.approx(float(entropy(counts.numpy(), base=2)), rel=1e-9, abs=1e-9)
    assert metrics.perplexity(counts) == pytest.approx(math.exp(float(entropy(counts.numpy()))), rel=1e-9)


@given(COUNTS)
def test_perplexity_lies_between_one_and_the_codes_in_use(counts: torch.Tensor) -> None:
    used = metrics.used(counts)
    assert 0 <= metrics.bits(counts) <= math.log2(max(used, 1)) + 1e-9
    assert min(used, 1) <= metrics.perplexity(counts) <= used * (1 + 1e-9)
    assert metrics.usage(counts) == used / len(counts)


@given(COUNTS)
def test_usage_does_not_depend_on_the_order_or_on_dead_codes(counts: torch.Tensor) -> None:
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(len(counts)))
    padded = torch.cat([counts[order], torch.zeros(7, dtype=torch.int64)])
    assert metrics.bits(padded) == pytest.approx(metrics.bits(counts), rel=1e-9, abs=1e-12)
    assert metrics.used(padded) == metrics.used(counts)
    assert metrics.top_share(padded) == metrics.top_share(counts)


def test_counts_beyond_float32_stay_exact() -> None:
    counts = torch.tensor([2**53, 1])  # float32 could not tell them, nor their sum, apart
    assert metrics.top_share(counts) == 2**53 / (2**53 + 1)
    assert metrics.used(counts) == 2
    assert 0 < metrics.bits(counts) < 1e-13


# --- psnr ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mse", "decibels"), [(1.0, 0.0), (0.1, 10.0), (0.001, 30.0), (4.0, -6.020599913279624)])
def test_psnr_by_hand(mse: float, decibels: float) -> None:
    assert metrics.psnr(mse) == pytest.approx(decibels, abs=1e-12)


def test_psnr_without_error_is_infinite_and_of_nan_is_nan() -> None:
    assert metrics.psnr(0.0) == math.inf
    assert math.isnan(metrics.psnr(math.nan))


def test_psnr_equals_scikit_images() -> None:
    rng = np.random.default_rng(0)
    images, others = rng.random((2, 3, 20, 20))
    mse = float(((images - others) ** 2).mean())
    assert metrics.psnr(mse) == pytest.approx(peak_signal_noise_ratio(images, others, data_range=1.0), rel=1e-12)


# --- ssim ----------------------------------------------------------------------------------------------------------

SCIKIT_IMAGE = {
    "channel_axis": 0,
    "gaussian_weights": True,
    "sigma": 1.5,
    "use_sample_covariance": False,
    "data_range": 1.0,
}
REACH = 5  # of the 11-pixel window around its centre


def pair(shape: tuple[int, ...], noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(shape[-1])
    images = torch.rand(shape, generator=generator)
    return images, (images + noise * torch.randn(shape, generator=generator)).clamp(0, 1)


@pytest.mark.parametrize("shape", [(5, 1, 11, 11), (1, 1, 12, 17), (4, 3, 32, 32), (3, 1, 64, 40), (1, 3, 11, 30)])
@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_ssim_equals_scikit_images_on_mirrored_borders(shape: tuple[int, ...], noise: float) -> None:
    """Both take a mean over all pixels, but mirror the border differently. So mirror it here, far enough that the
    windows of all the original pixels lie inside, and take scikit-image's map of those alone."""
    images, others = pair(shape, noise)
    found = metrics.ssim(images, others)
    assert found is not None and found.shape == (shape[0],)
    border = ((0, 0), (REACH, REACH), (REACH, REACH))
    for score, *both in zip(found.tolist(), images.double().numpy(), others.double().numpy(), strict=True):
        wide = [np.pad(image, border, mode="reflect") for image in both]
        _, full = structural_similarity(*wide, full=True, **SCIKIT_IMAGE)
        assert score == pytest.approx(full[:, REACH:-REACH, REACH:-REACH].mean(), rel=1e-12)


@pytest.mark.parametrize("shape", [(5, 1, 11, 11), (2, 3, 32, 32), (2, 3, 33, 64), (1, 2, 65, 31), (1, 1, 200, 12)])
@pytest.mark.parametrize("noise", [0.0, 1e-4, 0.3])
def test_ssim_is_what_torchmetrics_computes_in_float64(shape: tuple[int, ...], noise: float) -> None:
    images, others = pair(shape, noise)
    found = metrics.ssim(images, others)
    expected = structural_similarity_index_measure(
        others.double(), images.double(), data_range=1.0, reduction="none", sigma=1.5
    )
    assert found is not None and isinstance(expected, torch.Tensor)
    assert torch.allclose(found, expected, rtol=1e-12, atol=0)


def test_ssim_is_near_scikit_images_own_where_borders_hardly_count() -> None:
    images, others = pair((1, 1, 256, 256), 0.2)
    found = metrics.ssim(images, others)
    assert found is not None
    reference = structural_similarity(images[0].double().numpy(), others[0].double().numpy(), **SCIKIT_IMAGE)
    assert float(found[0]) == pytest.approx(reference, abs=2e-3)


def test_ssim_of_black_and_white_is_the_luminance_term_alone() -> None:
    """Flat images have no variance: (2ab + C1) / (a² + b² + C1), with C1 = 0.01², a = 0 and b = 1."""
    found = metrics.ssim(torch.zeros(2, 3, 16, 16), torch.ones(2, 3, 16, 16))
    assert found is not None
    assert found.tolist() == pytest.approx([1e-4 / (1 + 1e-4)] * 2, rel=1e-9)


def test_ssim_of_equal_images_is_one_and_each_pair_has_its_own() -> None:
    images, others = pair((3, 3, 16, 16), 0.3)
    others[1] = images[1]
    found = metrics.ssim(images, others)
    assert found is not None
    assert float(found[1]) == pytest.approx(1, abs=1e-6)
    assert float(found[0]) < 0.95 and float(found[2]) < 0.95
    alone = metrics.ssim(images[2:], others[2:])
    assert alone is not None and float(alone[0]) == pytest.approx(float(found[2]), abs=1e-6)


@pytest.mark.parametrize("sides", [(10, 11), (11, 10), (1, 64), (8, 8)])
def test_ssim_is_none_where_no_window_fits(sides: tuple[int, int]) -> None:
    assert metrics.ssim(torch.zeros(2, 3, *sides), torch.zeros(2, 3, *sides)) is None
