"""Metrics as pure functions of counts, errors, covariances and images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import linear_regression

import torch
from torch import Tensor
from torch.nn import functional

from codebook_tools.runtime.devices import wide


def used(counts: Tensor, hits: int = 1) -> int:
    """Number of codes with at least `hits` assignments. counts: (size,) int64."""
    return int((counts >= hits).sum())


def used_by_chance(latents: int, size: int) -> float:
    """Expected number of codes in use where each latent draws one of `size` uniformly: K (1 - (1 - 1/K)^n)."""
    if size < 2 or not latents:
        return float(size if latents else 0)
    return -size * math.expm1(latents * math.log1p(-1 / size))


def usage(counts: Tensor) -> float:
    """Share of codes with at least one assignment, 0 to 1. counts: (size,) int64; 0.0 for an empty codebook."""
    return used(counts) / len(counts) if len(counts) else 0.0


def bits(counts: Tensor) -> float:
    """Entropy of code usage in bits, the cost of a token to an ideal entropy coder.

    Args:
        counts: (size,) int64, assignments per code over the whole data set.

    Returns:
        Bits; 0.0 where all counts are 0.
    """
    total = int(counts.sum())
    if total == 0:
        return 0.0
    shares = counts[counts > 0].double() / total
    return max(0.0, -float((shares * shares.log2()).sum()))


def perplexity(counts: Tensor) -> float:
    """exp of the entropy, in nats, of code usage: 1 where one code is used, `size` where all are used equally.

    Source: van den Oord et al. 2017, as DeepMind Sonnet computes it, without its 1e-10.

    Args:
        counts: (size,) int64, assignments per code over the whole data set.

    Returns:
        The perplexity; 0.0 where all counts are 0.
    """
    return 2.0 ** bits(counts) if int(counts.sum()) else 0.0


def top_share(counts: Tensor) -> float:
    """Share of all assignments that the most used code takes; 0.0 where there are none. counts: (size,) int64."""
    total = int(counts.sum())
    return int(counts.max()) / total if total else 0.0


def participation_ratio(covariance: Tensor) -> float:
    """Effective dimension (tr C)² / tr C²: 1 for points on a line, dim for an isotropic distribution.

    Source: Gao et al. 2017, A theory of multineuronal dimensionality.

    Args:
        covariance: (dim, dim) float64.

    Returns:
        The ratio; 0.0 where nothing varies.
    """
    total, squares = float(covariance.trace()), float(covariance.square().sum())
    return total * total / squares if squares > 0 else 0.0


def dimensions_that_hold(covariance: Tensor, share: float = 0.99) -> int:
    """Smallest number of principal directions that hold a share of the variance; 0 where nothing varies.

    Args:
        covariance: (dim, dim) float64.
        share: Of the variance, 0 to 1.
    """
    variances = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
    total = float(variances.sum())
    return int((variances.cumsum(0) < share * total * (1 - 1e-9)).sum()) + 1 if total > 0 else 0


def covariance_of_moments(sums: Tensor, products: Tensor, n: int) -> Tensor:
    """Covariance of n rows from their moments.

    Args:
        sums: (dim,) float64, the sum of the rows.
        products: (dim, dim) float64, the sum of their outer products.
        n: Number of rows, at least 1.

    Returns:
        (dim, dim) float64; zeros where all rows are equal up to rounding.
    """
    mean = sums / n
    covariance = products / n - mean[:, None] * mean
    rounding = 1e-13 * float(products.diagonal().sum() / n)
    return covariance if float(covariance.trace()) > rounding else torch.zeros_like(covariance)


def covariance_of(rows: Tensor) -> Tensor:
    """Unbiased covariance of rows (n, dim), (dim, dim) float64."""
    centered = rows.double() - rows.double().mean(0)
    return torch.as_tensor(centered.T @ centered / max(len(rows) - 1, 1))


def frechet_distance(mean: Tensor, other_mean: Tensor, covariance: Tensor, other_covariance: Tensor) -> float:
    """Fréchet distance of two Gaussians, |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½). Source: Dowson and Landau 1982.

    Args:
        mean: (dim,) float64.
        other_mean: As mean.
        covariance: (dim, dim) float64; may be singular.
        other_covariance: As covariance.
    """
    variances, directions = torch.linalg.eigh(covariance)
    root = directions * variances.clamp(min=0).sqrt()  # C1 = root rootᵀ, and C1 C2 has the eigenvalues of rootᵀ C2 root
    common = torch.linalg.eigvalsh(root.T @ other_covariance @ root).clamp(min=0).sqrt().sum()
    traces = covariance.trace() + other_covariance.trace()
    return max(0.0, float((mean - other_mean).square().sum() + traces - 2 * common))


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of values in [0, 1]; infinite where `mse` is 0."""
    return math.inf if mse == 0 else -10 * math.log10(mse)


def ssim(images: Tensor, others: Tensor) -> Tensor | None:
    """Structural similarity of pairs of images, as torchmetrics computes it in float64.

    The window is a Gaussian of 11 pixels with sigma 1.5, borders are mirrored, and the mean is over all pixels and
    channels. float32 would not tell flat images apart. Source: Wang et al. 2004.

    Args:
        images: (n, channels, height, width) in [0, 1].
        others: Of the same shape and range.

    Returns:
        (n,) float64; None where a side is under 11 pixels, into which no window fits.
    """
    if min(images.shape[-2:]) < 2 * _REACH + 1:
        return None
    x, y = wide(images), wide(others)
    mean_x, mean_y, xx, yy, xy = map(_windowed, (x, y, x * x, y * y, x * y))
    both, squares = mean_x * mean_y, mean_x.square() + mean_y.square()
    variances = (xx - mean_x.square()).clamp(min=0) + (yy - mean_y.square()).clamp(min=0)
    scores = (2 * both + 0.01**2) * (2 * (xy - both) + 0.03**2) / ((squares + 0.01**2) * (variances + 0.03**2))
    return scores.flatten(1).mean(1)


_REACH, _TILE = 5, 32


def _windowed(values: Tensor) -> Tensor:
    """Weighted means in a window around each pixel, along rows and then columns, by matrix products over tiles of a
    line, which take a fraction of a convolution's time on a CPU, above all in float64."""
    taps = torch.exp(-torch.arange(-_REACH, _REACH + 1, dtype=torch.float64).square() / (2 * 1.5**2))
    places = torch.arange(_TILE)[:, None] + torch.arange(len(taps))
    weights = torch.zeros(_TILE, _TILE + 2 * _REACH, dtype=torch.float64)
    weights.scatter_(1, places, (taps / taps.sum()).expand(_TILE, -1))
    of_tile = weights.T.to(values.device)
    for _ in range(2):
        side = values.shape[-1]
        mirrored = functional.pad(values, (_REACH, _REACH, 0, 0), mode="reflect")
        tiles = functional.pad(mirrored, (0, -side % _TILE)).unfold(-1, len(of_tile), _TILE)
        values = (tiles @ of_tile).flatten(-2)[..., :side].mT
    return values


def detail(images: Tensor) -> Tensor | None:
    """Energy of the Laplacian: squares of four times a pixel minus its four neighbors, summed over inner pixels.

    It weighs a wave by the fourth power of its frequency, so blur lowers it. Source: Subbarao, Choi and Nikzad 1993,
    Focusing techniques.

    Args:
        images: (n, channels, height, width).

    Returns:
        (n,) float64, summed over channels; None where a side is under 3 pixels.
    """
    if min(images.shape[-2:]) < 3:
        return None
    images = wide(images)  # before the differences, which in float32 would lose digits of nearly flat images
    inner = images[..., 1:-1, 1:-1]
    around = images[..., :-2, 1:-1] + images[..., 2:, 1:-1] + images[..., 1:-1, :-2] + images[..., 1:-1, 2:]
    return (4 * inner - around).square().flatten(1).sum(1)


def effective_dimension(curve: Mapping[int, float]) -> float:
    """Effective dimension of latents from a rate-distortion curve.

    The slope of log distortion over log K is -2 / dimension at high rate. Source: Zador 1982.

    Args:
        curve: Distortion by K, at least two points.

    Returns:
        The dimension; infinite where distortion does not fall with K.
    """
    rates = [math.log(k) for k in curve]
    slope = linear_regression(rates, [math.log(max(distortion, 1e-30)) for distortion in curve.values()]).slope
    return -2 / slope if slope < 0 else math.inf
