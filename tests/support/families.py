"""A family's record put to work on a file, without the rest of the package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from conftest import State
from torch import Tensor

from codebook_tools.checkpoints.read import Checkpoint, read_checkpoint
from codebook_tools.checkpoints.tensors import Stored
from codebook_tools.models.family import Family, Shapes
from codebook_tools.models.registry import FAMILIES

NAMED_ALONE = {"rosinality-2019", "rq-vae-recommender-2025"}
"""Families of another's layout, which count only where they are asked for by name."""


def described(shapes: Mapping[str, Iterable[int]], metadata: dict[str, str] | None = None) -> Checkpoint:
    """A checkpoint of which only names and shapes are known, and what its header says of itself."""
    path = Path("described.safetensors")
    entries = {key: Stored(key, "F32", tuple(shape), path, 0, 0) for key, shape in shapes.items()}
    return Checkpoint(path, {**entries}, metadata or {}, (path,))


def shapes_of(state: State) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def claims(checkpoint: Checkpoint) -> dict[str, str]:
    """The prefix by name of every family that takes a checkpoint for its own."""
    prefixes = {name: family.prefix(checkpoint) for name, family in FAMILIES.items() if name not in NAMED_ALONE}
    return {name: prefix for name, prefix in prefixes.items() if prefix is not None}


def inner_shapes(checkpoint: Checkpoint, prefix: str) -> Shapes:
    """Those behind a family's prefix, by the family's own names."""
    return {key.removeprefix(prefix): shape for key, shape in checkpoint.shapes.items() if key.startswith(prefix)}


def loaded(family: Family, source: Path | Checkpoint) -> Any:
    """The family's network, every tensor of it from the file."""
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    prefix = family.prefix(checkpoint)
    assert prefix is not None and family.make is not None
    inner = inner_shapes(checkpoint, prefix)
    network = family.make(inner, checkpoint)
    stored = checkpoint.tensors()
    keys = {name: prefix + family.file_key(name, inner) for name in network.state_dict()}
    assert len(set(keys.values())) == len(keys)
    network.load_state_dict({name: stored[keys[name]].reshape(t.shape) for name, t in network.state_dict().items()})
    return network.eval()


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5, least: float = 0.1) -> None:
    """Equal to `tolerance` of the largest number, which is above `least`."""
    assert ours.shape == theirs.shape
    size = float(theirs.detach().abs().max())
    assert size > least
    assert float((ours - theirs).detach().abs().max()) <= tolerance * max(1.0, size)


def pictures(channels: int = 3, side: int = 16) -> Tensor:
    """(2, channels, side, side) in [-1, 1]."""
    return torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(7)) * 2 - 1
