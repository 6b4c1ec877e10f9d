"""Pure functions of counts and errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import linear_regression

import torch
from torch import Tensor
from torch.nn import functional

from codebook_tools.runtime.devices import wide


def used(counts: Tensor, hits: int = 1) -> int:
    """Codes with at least `hits` assignments. counts: (size,) int64."""
    return int((counts >= hits).sum())


def used_by_chance(latents: int, size: int) -> float:
    """Codes that are expected to be in use where each of so many latents draws one of `size` at random, all alike:
    K (1 - (1 - 1/K)^n)."""
    if size < 2 or not latents:
        return float(size if latents else 0)
    return -size * math.expm1(latents * math.log1p(-1 / size))


def usage(counts: Tensor) -> float:
    """Share of codes with at least one assignment, 0 to 1. counts: (size,) int64; 0.0 for an empty codebook."""
    return used(counts) / len(counts) if len(counts) else 0.0


def bits(counts: Tensor) -> float:
    """Entropy of code usage in bits: what an ideal entropy coder would spend on a token.

    counts: (size,) int64, assignments per code over the whole dataset. 0.0 when nothing was assigned.
    """
    total = int(counts.sum())
    if total == 0:
        return 0.0
    shares = counts[counts > 0].double() / total
    return max(0.0, -float((shares * shares.log2()).sum()))


def perplexity(counts: Tensor) -> float:
    """exp of the entropy, in nats, of code usage: 1 when one code is used, `size` when all are used alike.

    counts: (size,) int64, assignments per code over the whole dataset. 0.0 when nothing was assigned.
    Source: van den Oord et al. 2017, as DeepMind Sonnet computes it, without its 1e-10.
    """
    return 2.0 ** bits(counts) if int(counts.sum()) else 0.0


def top_share(counts: Tensor) -> float:
    """Share of all assignments that the most used code takes; 0.0 when there are none. counts: (size,) int64."""
    total = int(counts.sum())
    return int(counts.max()) / total if total else 0.0


def participation_ratio(covariance: Tensor) -> float:
    """In how many dimensions points spread alike: (tr C)² / tr C², 1 for points on a line, dim for a ball of them.

    covariance: (dim, dim) float64. 0.0 where nothing varies. Source: Gao et al. 2017, A theory of multineuronal
    dimensionality.
    """
    total, squares = float(covariance.trace()), float(covariance.square().sum())
    return total * total / squares if squares > 0 else 0.0


def dimensions_that_hold(covariance: Tensor, share: float = 0.99) -> int:
    """The fewest principal directions that hold a share of the variance; 0 where nothing varies.

    covariance: (dim, dim) float64."""
    variances = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
    total = float(variances.sum())
    return int((variances.cumsum(0) < share * total * (1 - 1e-9)).sum()) + 1 if total > 0 else 0


def covariance_of_moments(sums: Tensor, products: Tensor, n: int) -> Tensor:
    """(dim, dim) float64, of the sums (dim,) and the summed outer products (dim, dim) of n rows. Zeros where they are
    all alike, but for rounding."""
    mean = sums / n
    covariance = products / n - mean[:, None] * mean
    rounding = 1e-13 * float(products.diagonal().sum() / n)
    return covariance if float(covariance.trace()) > rounding else torch.zeros_like(covariance)


def covariance_of(rows: Tensor) -> Tensor:
    """(dim, dim) float64, of rows (n, dim)."""
    apart = rows.double() - rows.double().mean(0)
    return torch.as_tensor(apart.T @ apart / max(len(rows) - 1, 1))


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1]: infinite when there is no error."""
    return math.inf if mse == 0 else -10 * math.log10(mse)


def ssim(images: Tensor, others: Tensor) -> Tensor | None:
    """(n,) float64 structural similarity of each pair: Gaussian window of 11, sigma 1.5, borders mirrored, a mean over
    all pixels and channels; what torchmetrics computes in float64, as its float32 does not tell flat images apart.

    images, others: (n, channels, height, width) in [0, 1]. None where a side is under 11 pixels: no window fits.
    Source: Wang et al. 2004.
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
    """Weighted means in a window around each pixel, rows and columns in turn. Matrix products over tiles of a line take
    a fraction of a convolution's time on a CPU, most of all in float64."""
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
    """(n,) energy of the Laplacian of each image: the squares of four times a pixel less its four neighbours, added up
    over channels and the pixels that have them. Blur lowers it, for it weighs a wave by the fourth power of its
    frequency.

    images: (n, channels, height, width). None where a side is under 3 pixels.
    Source: Subbarao, Choi and Nikzad 1993, Focusing techniques.
    """
    if min(images.shape[-2:]) < 3:
        return None
    images = wide(images)  # first: of nearly flat images float32 would leave a third of the digits
    inner = images[..., 1:-1, 1:-1]
    around = images[..., :-2, 1:-1] + images[..., 2:, 1:-1] + images[..., 1:-1, :-2] + images[..., 1:-1, 2:]
    return (4 * inner - around).square().flatten(1).sum(1)


def effective_dimension(curve: Mapping[int, float]) -> float:
    """Of latents, by the slope of log distortion over log K: at high rate that is -2 / dimension (Zador 1982). Infinite
    where more codes leave no less. curve: distortion by K, two points or more."""
    sizes, left = zip(*((math.log(k), math.log(max(of, 1e-30))) for k, of in curve.items()), strict=True)
    slope = linear_regression(sizes, left).slope
    return -2 / slope if slope < 0 else math.inf
