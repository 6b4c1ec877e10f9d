"""A moving average of the trained weights, to be validated and kept in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from codebook_tools.training.state import Tensors, by_number, numbered


class WeightAverage:
    """An exponential moving average of weights, from their present values on.

    A codebook EMA and the running statistics of a batch norm are averages already, and are not among them.

    Attributes:
        tensors: The weights in training.
        averages: Their averages.
        decay: Of the average.
    """

    def __init__(self, tensors: Sequence[Tensor], decay: float) -> None:
        self.tensors = [tensor.detach() for tensor in tensors]  # detached, they share the memory
        self.averages = [tensor.clone() for tensor in self.tensors]
        self.decay = decay

    def update(self) -> None:
        """Average in the present weights."""
        for average, tensor in zip(self.averages, self.tensors, strict=True):
            average.lerp_(tensor, 1 - self.decay)

    def state(self) -> Tensors:
        """The averages by number."""
        return by_number(self.averages)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        _copy(numbered(state), self.averages)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the weights are their averages."""
        own = [tensor.clone() for tensor in self.tensors]
        _copy(self.averages, self.tensors)
        try:
            yield
        finally:
            _copy(own, self.tensors)


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
