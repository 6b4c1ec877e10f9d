"""A family's record put to work on a file, without the rest of the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codebook_tools.checkpoints.reading import Checkpoint, Entry, read_checkpoint
from codebook_tools.models.family import Family

State = dict[str, Tensor]


def described(shapes: dict[str, tuple[int, ...]]) -> Checkpoint:
    """A checkpoint of which only names and shapes are known."""
    return Checkpoint(
        Path("described.safetensors"), {key: Entry("F32", shape, 0, 0) for key, shape in shapes.items()}, {}
    )


def loaded(family: Family, path: Path) -> Any:
    """The family's network, every tensor of it from the file."""
    checkpoint = read_checkpoint(path)
    prefix = family.prefix(checkpoint)
    assert prefix is not None and family.make is not None
    inner = {key.removeprefix(prefix): shape for key, shape in checkpoint.shapes.items() if key.startswith(prefix)}
    network = family.make(inner, checkpoint)
    stored = checkpoint.tensors()
    keys = {name: prefix + family.file_key(name, inner) for name in network.state_dict()}
    assert len(set(keys.values())) == len(keys)
    network.load_state_dict({name: stored[keys[name]].reshape(t.shape) for name, t in network.state_dict().items()})
    return network.eval()


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` of the largest number, which is no small one."""
    assert ours.shape == theirs.shape
    size = float(theirs.abs().max())
    assert size > 0.1
    assert float((ours - theirs).abs().max()) <= tolerance * max(1.0, size)


def pictures(channels: int = 3, side: int = 16) -> Tensor:
    """(2, channels, side, side) in [-1, 1]."""
    return torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(7)) * 2 - 1
