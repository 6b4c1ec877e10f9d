"""Alternative explanations of codes that do not fit their latents, each measured by the same fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import nearest
from codebook_tools.codebook import Codebook
from codebook_tools.diagnosis.close_look import rows_of, shuffled_rows
from codebook_tools.diagnosis.evidence import Alternative
from codebook_tools.diagnosis.fit import fit_of

_STEPS = 8


def scaled(codebook: Codebook, latents: Tensor, seed: int) -> Iterator[Alternative]:
    """The same codes at the length that fits latents (n, dim) best; none by the cosine, for which any length does."""
    if codebook.metric.by_direction or not bool(codebook.vectors.any()):
        return
    times = best_scale(codebook, latents)
    if times > 0 and (fit := fit_of(replace(codebook, vectors=codebook.vectors * times), latents, seed)):
        yield Alternative("scale", fit, f"the same codes, {times:.3g} times as long")


def best_scale(codebook: Codebook, latents: Tensor) -> float:
    """The factor that brings the codes nearest to latents (n, dim).

    Least squares and nearest codes in turn, from equal mean squares on.
    """
    codes = codebook.vectors
    times = float((latents.square().sum(1).mean() / codes.square().sum(1).mean()).sqrt())
    for _ in range(_STEPS):
        chosen = codes[nearest(latents, replace(codebook, vectors=codes * times))]
        times = float((latents * chosen).sum() / chosen.square().sum().clamp(min=1e-30))
    return times


def cut_wrongly(codebook: Codebook, grids: Tensor, seed: int) -> Iterator[Alternative]:
    """Latents (images, dim, *grid) whose memory was cut into rows as it lies, without moving the channels last."""
    if fit := fit_of(codebook, cut_rows(grids, codebook.dim, seed), seed):
        yield Alternative("layout", fit, "latents flattened without moving the channels last")


def cut_rows(grids: Tensor, dim: int, seed: int) -> Tensor:
    """(n, dim): the memory of latents (images, dim, *grid), cut as it lies."""
    return shuffled_rows(grids.contiguous().reshape(-1, dim), seed)


def of_range(codebook: Codebook, grids: Tensor, bounds: tuple[float, float], seed: int) -> Iterator[Alternative]:
    """Latents (images, dim, *grid) of the same images, mapped to other bounds."""
    if fit := fit_of(codebook, rows_of(grids, seed), seed):
        yield Alternative("range", fit, f"latents of images in {range_text(bounds)}")


def range_text(bounds: tuple[float, float]) -> str:
    """An input range in words."""
    return f"[{bounds[0]:g}, {bounds[1]:g}]"


def of_original(codebook: Codebook, rows: Tensor, seed: int) -> Iterator[Alternative]:
    """Latents (n, dim) of the original's encoder."""
    if fit := fit_of(codebook, rows, seed):
        yield Alternative("original", fit, "latents of the original's encoder")


def of_companions(codebook: Codebook, meant: Tensor, latents: Tensor, seed: int) -> Iterator[Alternative]:
    """The codes (size, dim) that the running sums beside the codebook imply."""
    if torch.isfinite(meant).all() and (fit := fit_of(replace(codebook, vectors=meant), latents, seed)):
        yield Alternative("companions", fit, "the codes that the running sums beside them stand for")
