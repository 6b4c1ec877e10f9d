"""Every metric against an independent implementation of it, on random and on degenerate input.

    python benchmarks/trust/twins.py [--draws 1000] [--seed N]

The largest relative difference of each goes to benchmarks/results/trust.json; none may be above 1e-6.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from record import record
from scipy.ndimage import laplace
from scipy.spatial.distance import cdist
from scipy.stats import entropy
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from codebook_tools.clustering.assignment import nearest
from codebook_tools.codebook import Codebook
from codebook_tools.evaluation import metrics
from codebook_tools.evaluation.accumulators import Sums, book_sums
from codebook_tools.evaluation.exact import exact
from codebook_tools.evaluation.figures import measurement_of
from codebook_tools.strategies.quantize import round_rows

Random = np.random.Generator
Pair = Callable[[Random], tuple[float, float]]
LIMIT = 1e-6


def counts(random: Random) -> Tensor:
    """Of 1 to 2,000 codes: of any steepness, many or all of them dead, or in one code."""
    size = int(random.integers(1, 2000))
    kind = random.integers(5)
    if kind == 0:
        found = random.integers(0, 10 ** random.integers(1, 13), size)
    elif kind == 1:
        found = np.bincount(random.zipf(random.uniform(1.1, 3), 5000).clip(max=size) - 1, minlength=size)
    elif kind == 2:
        found = random.integers(1, 50, size) * (random.random(size) < 0.05)
    else:
        found = np.zeros(size, dtype=np.int64)
        found[random.integers(size)] = 0 if kind == 3 else 10 ** random.integers(0, 13)
    return torch.from_numpy(found.astype(np.int64))


def images(random: Random) -> tuple[Tensor, Tensor]:
    """Two batches that differ by noise of any strength, in flat, black, white and noisy pictures."""
    shape = (int(random.integers(1, 4)), int(random.choice([1, 3])), *map(int, random.integers(11, 70, 2)))
    kind = random.integers(4)
    first = random.random(shape) if kind else np.full(shape, random.choice([0, 0.5, 1]))
    noise = random.choice([0, 1e-6, 1e-3, 0.1, 1]) * random.standard_normal(shape)
    pair = np.stack([first, (first + noise).clip(0, 1)]).astype(np.float32)
    return torch.from_numpy(pair[0]), torch.from_numpy(pair[1])


def latents(random: Random) -> tuple[Tensor, Codebook]:
    """Near and far from codes, at any scale, some codes the same."""
    size, dim, count = (int(random.integers(1, most)) for most in (60, 40, 400))
    scale = 10.0 ** random.integers(-6, 7)
    codes = scale * random.standard_normal((size, dim))
    codes[random.integers(size)] = codes[0]
    rows = codes[random.integers(0, size, count)] + scale * random.choice([0.01, 1]) * random.standard_normal(
        (count, dim)
    )
    return torch.from_numpy(rows.astype(np.float32)), Codebook(torch.from_numpy(codes.astype(np.float32)))


def of_counts(ours: Callable[[Tensor], float], theirs: Callable[[NDArray[np.int64]], float]) -> Pair:
    def pair(random: Random) -> tuple[float, float]:
        drawn = counts(random)
        return ours(drawn), theirs(drawn.numpy())

    return pair


def of_images(ours: Callable[[Tensor, Tensor], float], theirs: Callable[[Tensor, Tensor], float]) -> Pair:
    def pair(random: Random) -> tuple[float, float]:
        drawn = images(random)
        return ours(*drawn), theirs(*drawn)

    return pair


def _shares(hits: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.asarray(hits / max(1, hits.sum()), dtype=np.float64)


def _sonnet(hits: NDArray[np.int64]) -> float:
    """exp(-sum(p log(p + 1e-10))), as Sonnet has it; of no hits at all it says 1, and we say 0."""
    shares = _shares(hits)
    return float(np.exp(-np.sum(shares * np.log(shares + 1e-10)))) if hits.sum() else 0.0


def _measured(first: Tensor, other: Tensor) -> Sums:
    return Sums(
        images=len(first),
        values=first.numel(),
        error=exact(float((other - first).double().square().sum())),
        similarity=None,
        books=(),
        detail=None,
        reconstructed_detail=None,
    )


def _psnr_of(first: Tensor, other: Tensor) -> float:
    found = measurement_of(_measured(first, other), "test").psnr
    return np.inf if found is None else found


def _skimage_psnr(first: Tensor, other: Tensor) -> float:
    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(first.double().numpy(), other.double().numpy(), data_range=1.0))


def _ssim(first: Tensor, other: Tensor) -> float:
    found = metrics.ssim(first, other)
    assert found is not None
    return float(found.sum())


def _torchmetrics_ssim(first: Tensor, other: Tensor) -> float:
    found = structural_similarity_index_measure(
        other.double(), first.double(), data_range=1.0, sigma=1.5, reduction="sum"
    )
    assert isinstance(found, Tensor)
    return float(found)


def _detail(first: Tensor, other: Tensor) -> float:
    found = metrics.detail(other)
    assert found is not None
    return float(found.sum())


def _scipy_detail(first: Tensor, other: Tensor) -> float:
    planes = other.double().numpy().reshape(-1, *other.shape[-2:])
    return float(sum((laplace(plane)[1:-1, 1:-1] ** 2).sum() for plane in planes))


def distortion(random: Random) -> tuple[float, float]:
    rows, codebook = latents(random)
    found = book_sums("", codebook, None, rows, nearest(rows, codebook))
    theirs = cdist(rows.double().numpy(), codebook.vectors.double().numpy(), "sqeuclidean").min(1)
    return float(found.error) / len(rows), float(theirs.mean())


def covered(random: Random) -> tuple[float, float]:
    rows, codebook = latents(random)
    theirs = cdist(rows.double().numpy(), codebook.vectors.double().numpy(), "sqeuclidean").min(1)
    between = np.sort(theirs)[len(theirs) // 2 - 1 : len(theirs) // 2 + 1]
    reference = float(between.mean())  # not at a latent's own distance, which rounding could put on either side
    found = book_sums("", codebook, reference, rows, nearest(rows, codebook))
    assert found.near is not None
    return float(found.near), float((theirs <= reference).sum())


def dimension(random: Random) -> tuple[float, float]:
    sizes = 2 ** np.arange(4, 4 + random.integers(2, 8))
    left = random.uniform(0.1, 10) * sizes ** -random.uniform(0.05, 2) * random.uniform(0.99, 1.01, len(sizes))
    slope = np.polyfit(np.log(sizes), np.log(left), 1)[0]
    ours = metrics.effective_dimension(dict(zip(sizes.tolist(), left.tolist(), strict=True)))
    return ours, -2 / slope if slope < 0 else np.inf


def rounding(random: Random) -> tuple[float, float]:
    """Not a metric: no entry moves by more than half a step. The larger of what it moved and the bound, over it."""
    rows, bits = latents(random)[1].vectors, int(random.integers(2, 9))
    moved = (round_rows(rows, bits).double() - rows.double()).abs().amax(1)
    bound = rows.double().abs().amax(1) / (2**bits - 2)
    return float((moved / bound.clamp(min=1e-300)).clamp(min=1).max()), 1.0


TWINS: dict[str, tuple[str, Pair]] = {
    "used": ("numpy", of_counts(metrics.used, lambda hits: float(np.count_nonzero(hits)))),
    "usage": ("numpy", of_counts(metrics.usage, lambda hits: float(np.mean(hits > 0)))),
    "bits": ("scipy.stats.entropy", of_counts(metrics.bits, lambda h: float(entropy(h, base=2)) if h.sum() else 0.0)),
    "perplexity": ("Sonnet's formula", of_counts(metrics.perplexity, _sonnet)),
    "top share": ("numpy", of_counts(metrics.top_share, lambda hits: float(_shares(hits).max()))),
    "mse": (
        "skimage.metrics.mean_squared_error",
        of_images(
            lambda first, other: measurement_of(_measured(first, other), "test").error,
            lambda first, other: float(mean_squared_error(first.double().numpy(), other.double().numpy())),
        ),
    ),
    "psnr": ("skimage.metrics.peak_signal_noise_ratio", of_images(_psnr_of, _skimage_psnr)),
    "ssim": ("torchmetrics in float64", of_images(_ssim, _torchmetrics_ssim)),
    "detail": ("scipy.ndimage.laplace", of_images(_detail, _scipy_detail)),
    "distortion": ("scipy.spatial.distance.cdist", distortion),
    "covered": ("scipy.spatial.distance.cdist", covered),
    "effective dimension": ("numpy.polyfit", dimension),
    "half a step of --bits": ("its bound", rounding),
}


@dataclass
class Widest:
    """The largest relative difference so far, and the two values that had it."""

    difference: float = 0.0
    values: tuple[float, float] | None = None

    def see(self, ours: float, theirs: float) -> None:
        alike = ours == theirs or (np.isnan(ours) and np.isnan(theirs))
        apart = 0.0 if alike else abs(ours - theirs) / max(abs(theirs), 1e-300)
        if not apart <= self.difference:
            self.difference, self.values = apart, (ours, theirs)


def draws(name: str, count: int, seed: int) -> Iterator[tuple[float, float]]:
    random = np.random.default_rng([seed, *name.encode()])
    for _ in range(count):
        yield TWINS[name][1](random)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found = dict[str, object]()
    wrong = False
    for name, (twin, _) in TWINS.items():
        widest = Widest()
        for pair in draws(name, given.draws, given.seed):
            widest.see(*pair)
        found[name] = {"twin": twin, "largest relative difference": widest.difference}
        wrong |= not widest.difference <= LIMIT
        print(f"{name}: {widest.difference:.1e} {widest.values or ''}", file=sys.stderr, flush=True)
    record(
        "twins",
        f"python benchmarks/trust/twins.py --draws {given.draws} --seed {given.seed}",
        {"draws of each": given.draws, "limit": LIMIT, "metrics": found},
    )
    sys.exit(wrong)


if __name__ == "__main__":
    main()
