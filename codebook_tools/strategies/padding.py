"""Padding with dead codes: a config may have one size for many codebooks, or allow powers of two only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from codebook_tools.codebook import REMOVED, Codebook, Surgery


def filled(surgery: Surgery, old: Codebook, counts: Tensor, size: int) -> Surgery:
    """Pad a surgery with codes that no latent is assigned to.

    Where the new codes are old ones, removed codes with count 0 are kept after all, lowest index first, with their
    identity and in the old order. The rest are copies of code 0 at the end, which win no latent: the lowest index among
    equals does.

    Args:
        surgery: The surgery.
        old: The old codebook.
        counts: (old.size,) int64, over the calibration data.
        size: Of the padded codebook; the surgery is returned as it is where it has as many.
    """
    missing = size - surgery.codebook.size
    if missing <= 0:
        return surgery
    own, index_map = surgery.codebook.vectors, surgery.index_map
    stays = index_map != REMOVED
    if int(stays.sum()) == len(own) and torch.equal(own[index_map[stays]], old.vectors[stays]):
        stays[(~stays & (counts == 0)).nonzero()[:missing, 0]] = True
        own, index_map = old.vectors[stays], torch.where(stays, stays.cumsum(0) - 1, REMOVED)
    vectors = torch.cat([own, own[:1].expand(size - len(own), -1)])
    first = surgery.first if surgery.first and surgery.first.codebook.size > size else None
    return replace(surgery, codebook=replace(surgery.codebook, vectors=vectors), index_map=index_map, first=first)


def common_sizes(before: Sequence[int], after: Sequence[int], powers_of_two: bool) -> list[int]:
    """Sizes that codebooks are padded to: codebooks of one size stay of one size, the largest of them.

    Args:
        before: Old sizes.
        after: Sizes after surgery.
        powers_of_two: Whether the config takes powers of two only.
    """
    sizes = [max(after)] * len(after) if len(set(before)) == 1 else list(after)
    return [power_of_two(size) for size in sizes] if powers_of_two else sizes


def remark(keys: Sequence[str], asked: Sequence[int], sizes: Sequence[int]) -> list[str]:
    """The warning that codebooks were padded, and with how many dead codes each; empty where none was.

    Args:
        keys: Of the codebooks.
        asked: Sizes after surgery.
        sizes: Padded sizes.
    """
    added = [(size - least, key) for key, least, size in zip(keys, asked, sizes, strict=True) if size > least]
    if not added:
        return []
    few = ", ".join(f"{count} of {key}" for count, key in added[:3]) + (", ..." if len(added) > 3 else "")
    return [f"codebooks must be of one size that the config takes, {max(sizes)}: dead codes fill them up, {few}"]


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()
