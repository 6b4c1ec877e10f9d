"""What else the codes of a book might be of, where they are not of its latents: each rival is measured alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import nearest
from codebook_tools.codebook import Codebook
from codebook_tools.diagnosis.close_look import rows_of, shuffled_rows
from codebook_tools.diagnosis.evidence import Rival
from codebook_tools.diagnosis.fit import fit_of

_STEPS = 8


def scaled(codebook: Codebook, latents: Tensor, seed: int) -> Iterator[Rival]:
    """The same codes at the length that fits latents (n, dim) best; by the cosine any length does."""
    if codebook.metric.by_direction or not bool(codebook.vectors.any()):
        return
    times = best_scale(codebook, latents)
    if times > 0 and (fit := fit_of(replace(codebook, vectors=codebook.vectors * times), latents, seed)):
        yield Rival("scale", fit, f"the same codes, {times:.3g} times as long")


def best_scale(codebook: Codebook, latents: Tensor) -> float:
    """By what to multiply the codes: least squares and nearest codes in turn, from equal mean squares on."""
    codes = codebook.vectors
    times = float((latents.square().sum(1).mean() / codes.square().sum(1).mean()).sqrt())
    for _ in range(_STEPS):
        chosen = codes[nearest(latents, replace(codebook, vectors=codes * times))]
        times = float((latents * chosen).sum() / chosen.square().sum().clamp(min=1e-30))
    return times


def cut_wrongly(codebook: Codebook, grids: Tensor, seed: int) -> Iterator[Rival]:
    """Latents (images, dim, *grid) whose memory was cut into rows as it lies, without moving the channels last."""
    if fit := fit_of(codebook, cut_rows(grids, codebook.dim, seed), seed):
        yield Rival("layout", fit, "latents flattened without moving the channels last")


def cut_rows(grids: Tensor, dim: int, seed: int) -> Tensor:
    """(n, dim): the memory of latents (images, dim, *grid), cut as it lies."""
    return shuffled_rows(grids.contiguous().reshape(-1, dim), seed)


def of_range(codebook: Codebook, grids: Tensor, bounds: tuple[float, float], seed: int) -> Iterator[Rival]:
    """Latents (images, dim, *grid) of the same images, mapped to other bounds."""
    if fit := fit_of(codebook, rows_of(grids, seed), seed):
        yield Rival("range", fit, f"latents of images in [{bounds[0]:g}, {bounds[1]:g}]")


def of_original(codebook: Codebook, rows: Tensor, seed: int) -> Iterator[Rival]:
    """Latents (n, dim) by the original's encoder."""
    if fit := fit_of(codebook, rows, seed):
        yield Rival("original", fit, "latents of the original's encoder")


def of_companions(codebook: Codebook, meant: Tensor, latents: Tensor, seed: int) -> Iterator[Rival]:
    """The codes (size, dim) that the running sums beside the codebook stand for."""
    if torch.isfinite(meant).all() and (fit := fit_of(replace(codebook, vectors=meant), latents, seed)):
        yield Rival("companions", fit, "the codes that the running sums beside them stand for")
