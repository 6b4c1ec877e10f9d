"""The new code nearest to each old one, by where its latents went."""

from __future__ import annotations

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import nearest
from codebook_tools.codebook import REMOVED, Codebook


def nearest_map(
    index_map: Tensor, old: Codebook, new: Codebook, samples: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Give every removed code the new code that stands in for it.

    Args:
        index_map: (old size,) int64, as in Surgery.
        old: The codebook before the surgery.
        new: The codebook after it.
        samples: Codes of the same latents before and after, (n,) int64 each; None without latents.

    Returns:
        (old size,) int64. A code that kept its identity has its new code. A removed one has the code that most of its
        latents are assigned to, the lowest index among equals, or, without latents, the code nearest to its vector.
    """
    removed = index_map == REMOVED
    stand_in = index_map.clone()
    stand_in[removed] = nearest(old.vectors[removed], new)
    if samples is None:
        return stand_in
    old_codes, new_codes = samples
    pairs, hits = torch.unique(old_codes * new.size + new_codes, return_counts=True)
    most = torch.zeros(old.size, dtype=torch.int64)
    for pair, count in zip(pairs.tolist(), hits.tolist(), strict=True):
        code, target = divmod(pair, new.size)
        if removed[code] and count > most[code]:
            most[code], stand_in[code] = count, target
    return stand_in
