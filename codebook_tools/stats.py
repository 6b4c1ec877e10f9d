"""Counts of a pass over a data set, kept in a file: what `prune` and `quantize` need to know of the images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.layout import PREFIX
from codebook_tools.checkpoints.reading import Checkpoint, read_checkpoint
from codebook_tools.checkpoints.writing import write_tensors
from codebook_tools.errors import CodebookError


@dataclass(frozen=True, eq=False)
class Stats:
    """counts: (size,) int64, assignments per code. error: sum of squared distances from latents to their codes. split:
    whose latents they are, "calibration" or "test". images: how many those were, 0 where there were only latents."""

    counts: Tensor
    error: float
    split: str
    images: int


def write_stats(path: Path, checkpoint: Checkpoint, stats: Mapping[str, Stats]) -> None:
    """Write them, by codebook key, for a checkpoint. Raises CodebookError where the disk fails."""
    one = next(iter(stats.values()))
    about = {"checkpoint_sha256": checkpoint.sha256, "split": one.split, "images": str(one.images)}
    tensors = dict[str, Tensor]()
    for key, found in stats.items():
        tensors[f"{key}/counts"] = found.counts
        tensors[f"{key}/squared_error"] = torch.tensor(found.error, dtype=torch.float64)
    write_tensors(path, tensors, {PREFIX + name: value for name, value in about.items()})


def read_stats(path: Path, checkpoint: Checkpoint, found: FoundCodebook) -> Stats:
    """Read them back. Raises CodebookError where they are of another checkpoint, or damaged."""
    stored = read_checkpoint(path)
    made_for = stored.metadata.get(PREFIX + "checkpoint_sha256")
    if made_for is None or f"{found.key}/counts" not in stored.entries:
        raise CodebookError(f"{path} holds no counts of {found.key}; `codebook measure --stats FILE` writes them")
    if made_for != checkpoint.sha256:
        raise CodebookError(
            f"{path} counts the codes of another checkpoint; measure {checkpoint.path} with a --stats of its own"
        )
    counts = stored.tensor(f"{found.key}/counts")
    error = stored.tensor(f"{found.key}/squared_error") if f"{found.key}/squared_error" in stored.entries else None
    images = stored.metadata.get(PREFIX + "images", "")
    sound = counts.dtype == torch.int64 and counts.shape == (found.size,) and not bool((counts < 0).any())
    if not sound or error is None or error.numel() != 1 or not images.isdecimal():
        raise CodebookError(f"{path} is damaged: its counts are not those of {found.size} codes; measure anew")
    return Stats(counts, float(error), stored.metadata.get(PREFIX + "split", ""), int(images))
