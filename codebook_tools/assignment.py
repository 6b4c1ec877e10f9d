"""Nearest code: the one function that decides which code a latent belongs to, whatever its size and device."""

from __future__ import annotations

import torch
from torch import Tensor

from codebook_tools.codebook import Codebook, Emit, Lookup

# Scores that fit the cache of one core are searched fastest; a GPU wants far larger tiles. Both stay under 256 MB.
_TILE_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}


def unit(rows: Tensor) -> Tensor:
    """rows (n, dim) at Euclidean length 1; those shorter than 1e-12 stay shorter, as they do in models; zeros stay."""
    return torch.nn.functional.normalize(rows, dim=-1)


def emitted(codebook: Codebook) -> Tensor:
    """(size, dim) float32: what the decoder gets of each code."""
    return unit(codebook.vectors) if codebook.emit is Emit.UNIT else codebook.vectors


def nearest(latents: Tensor, codebook: Codebook) -> Tensor:
    """(n,) int64: the nearest code of each latent, by the codebook's own lookup; the lowest index among equals.

    latents: (n, dim) float32 on any device; the codes are moved there. The search runs in float32 over tiles of at
    most 128 MB whatever n and size. Where the two best scores lie within float32's rounding of each other, float64
    decides. So the answer does not depend on tile, thread or codebook size: dropping codes that nobody uses changes
    no assignment.
    """
    if codebook.lookup is Lookup.EUCLIDEAN:
        codes = codebook.vectors.to(latents.device)
    else:
        codes = unit(codebook.vectors.to(latents.device)) if codebook.lookup is Lookup.COSINE else codebook.vectors
        codes = codes.to(latents.device)
    squares = codebook.lookup is not Lookup.DOT
    norms = codes.square().sum(1) if squares else codes.new_zeros(len(codes))
    weights = (-2 * codes if squares else -codes).T.contiguous()
    longest = codes.norm(dim=1).max()
    # Error of a float32 inner product of `dim` terms, doubled for two scores: Higham 2002, section 3.1. `tiny` is for
    # products too small for float32.
    single, terms = torch.finfo(torch.float32), 4 * (codebook.dim + 4)

    rows = max(1, _TILE_BYTES.get(latents.device.type, 4 << 20) // (4 * max(len(codes), codebook.dim)))
    found = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
    for start in range(0, len(latents), rows):
        tile = latents[start : start + rows]
        if codebook.lookup is Lookup.COSINE:
            tile = unit(tile)
        scores = torch.addmm(norms, tile, weights)
        if len(codes) == 1:
            found[start : start + rows] = 0
            continue
        best, index = scores.topk(2, dim=1, largest=False)
        index = index[:, 0]
        gap = best[:, 1] - best[:, 0]
        slack = terms * (single.eps * longest * (tile.norm(dim=1) + longest) + single.tiny)
        unsure = ~((gap > slack) & gap.isfinite())  # scores that overflow have no gap, or an infinite one
        if bool(unsure.any()):
            index[unsure] = _nearest_exact(tile[unsure], codes, squares)
        found[start : start + rows] = index
    return found


def _nearest_exact(latents: Tensor, codes: Tensor, squares: bool) -> Tensor:
    """(n,) int64, decided in float64 from differences, which do not cancel as the expanded square does.

    A code's score is summed by itself: a matrix product may give equal codes scores that differ by their column.
    """
    wide = codes.double()
    # Differences and their squares lie side by side: on a CPU, few enough that memory hardly notices.
    rows = max(1, (_TILE_BYTES["cuda"] if latents.is_cuda else 16 << 20) // (8 * wide.numel()))
    found = []
    for tile in torch.split(latents.double(), rows):
        scores = (tile[:, None] - wide).square().sum(2) if squares else -(tile[:, None] * wide).sum(2)
        # min() promises no particular index among equals; the first equal one is the lowest.
        found.append((scores == scores.amin(1, keepdim=True)).int().argmax(1))
    return torch.cat(found)


def squared_errors(latents: Tensor, codebook: Codebook, codes: Tensor) -> Tensor:
    """(n,) float32: squared Euclidean distance, summed over dimensions, from each latent to the code that is emitted.

    latents: (n, dim) float32. codes: (n,) int64, its codes. A latent is normalised where lookup and output both are.
    """
    if codebook.lookup is Lookup.COSINE and codebook.emit is Emit.UNIT:
        latents = unit(latents)
    return (latents - emitted(codebook).to(latents.device)[codes]).square().sum(1)
