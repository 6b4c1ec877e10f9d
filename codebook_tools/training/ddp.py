"""Distributed data-parallel training (DDP)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from codebook_tools.models.model import Model
from codebook_tools.models.network import Quantize
from codebook_tools.runtime import distributed


class _Whole(nn.Module):
    """All that trains in one module, as DistributedDataParallel wants it."""

    def __init__(self, model: Model, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.network, self.trained, self.run = model.network, nn.ParameterList(parameters), model.run

    def forward(self, media: Tensor, quantize: Quantize) -> Tensor:
        return self.run(media, quantize)


def run_together(model: Model, parameters: Sequence[nn.Parameter]) -> Callable[[Tensor, Quantize], Tensor]:
    """`model.run`; of several processes in DDP, which averages the gradients of the parameters over them."""
    if distributed.count() == 1 or not parameters:
        return model.run
    return nn.parallel.DistributedDataParallel(_Whole(model, parameters), gradient_as_bucket_view=True)
