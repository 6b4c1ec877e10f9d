"""The side of the images that a model was trained on, by its config."""

from __future__ import annotations

from codebook_tools.checkpoints.config import entry_of
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.models.registry import FAMILIES

_ENTRIES = ("image_size", "resolution", "sample_size")
_UNSAID = ("sample_size", 32)  # what diffusers writes where nobody said a size: of amused at 256 pixels, too
_FAR = 2  # times larger or smaller: networks that see twice the side of their training still reconstruct


def size_warning(checkpoint: Checkpoint, family: str, size: int | tuple[int, int]) -> list[str]:
    """A warning where images of `size` pixels a side are far from the size in the config; else none."""
    named = _named(checkpoint, family)
    sides = size if isinstance(size, tuple) else (size,)
    typed = ",".join(map(str, sides))
    if named is None or all(named[1] <= _FAR * side <= _FAR * _FAR * named[1] for side in sides):
        return []
    entry, side = named
    return [f"--size {typed} is far from {side}, which is {entry} in the model's config; --size {side} is its own"]


def _named(checkpoint: Checkpoint, family: str) -> tuple[str, int] | None:
    """The entry and its pixels, beside or above the entry that is K."""
    record = FAMILIES.get(family)
    if record is None or record.config_key is None or checkpoint.config is None:
        return None
    levels = record.config_key.split(".")[:-1]
    for depth in range(len(levels), -1, -1):
        for name in _ENTRIES:
            entry = ".".join((*levels[:depth], name))
            side = entry_of(checkpoint.config, entry)
            if isinstance(side, int) and side > 0 and (name, side) != _UNSAID:
                return entry, side
    return None
