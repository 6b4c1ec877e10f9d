"""Index maps: what became of each old code."""

from __future__ import annotations

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import nearest
from codebook_tools.codebook import REMOVED, Codebook


def nearest_map(
    index_map: Tensor, old: Codebook, new: Codebook, samples: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """(old size,) int64: where a code kept its identity, the new code; else the one that most of its latents go to,
    the lowest among equals, and the nearest one where it had no latents.

    index_map: as Surgery's. samples: codes of the same latents before and after, (n,) int64 each; None where no latents
    are known.
    """
    gone = index_map == REMOVED
    found = index_map.clone()
    found[gone] = nearest(old.vectors[gone], new)
    if samples is None:
        return found
    old_codes, new_codes = samples
    pairs, hits = torch.unique(old_codes * new.size + new_codes, return_counts=True)
    most = torch.zeros(old.size, dtype=torch.int64)
    for pair, count in zip(pairs.tolist(), hits.tolist(), strict=True):
        code, target = divmod(pair, new.size)
        if gone[code] and count > most[code]:
            most[code], found[code] = count, target
    return found
