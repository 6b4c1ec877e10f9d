"""A moving average of what gradients move, to be validated and kept in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from codebook_tools.training.state import Tensors, by_number, numbered


class WeightAverage:
    """An exponential moving average of tensors, from where they are on. It is of the weights alone: an EMA codebook is
    an average already, and the running statistics of a batch norm are, too."""

    def __init__(self, tensors: Sequence[Tensor], decay: float) -> None:
        self.tensors = [tensor.detach() for tensor in tensors]  # detached, they share the numbers
        self.averages = [tensor.clone() for tensor in self.tensors]
        self.decay = decay

    def update(self) -> None:
        """Take in the tensors as they are."""
        for average, tensor in zip(self.averages, self.tensors, strict=True):
            average.lerp_(tensor, 1 - self.decay)

    def state(self) -> Tensors:
        return by_number(self.averages)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        _copy(numbered(state), self.averages)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the tensors hold their averages."""
        own = [tensor.clone() for tensor in self.tensors]
        _copy(self.averages, self.tensors)
        try:
            yield
        finally:
            _copy(own, self.tensors)


def _copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for its, into in zip(source, target, strict=True):
            into.copy_(its)
