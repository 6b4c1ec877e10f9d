"""Tensors of many owners in one dict: each owner's name, a slash, and its own name for the tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

Tensors = dict[str, Tensor]


def joined(parts: Mapping[str, Mapping[str, Tensor]]) -> Tensors:
    return {f"{owner}/{name}": tensor for owner, its in parts.items() for name, tensor in its.items()}


def part(tensors: Mapping[str, Tensor], owner: str) -> Tensors:
    """What `joined` got from that owner."""
    start = f"{owner}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def by_number(tensors: Iterable[Tensor]) -> Tensors:
    return {str(i): tensor for i, tensor in enumerate(tensors)}


def numbered(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The inverse of `by_number`."""
    return [tensors[name] for name in sorted(tensors, key=int)]
