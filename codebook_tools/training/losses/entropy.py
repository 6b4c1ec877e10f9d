"""The entropy loss: confident assignments of single latents, and even usage of all codes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from codebook_tools.codebook import Metric

_TEMPERATURE = 0.3  # of the mean squared distance to the nearest code: others count where they are about as near
_AT_MOST = 1 << 24  # distances at a time; gradients need a few tensors of as many


def indecision(rows: Tensor, vectors: Tensor, metric: Metric) -> Tensor:
    """Mean entropy of the soft assignments of latents, minus the entropy of their mean, over log(size).

    A soft assignment is the softmax of the negative squared distances, in units of those to the nearest codes.
    Source: Yu et al. 2024, "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation" (arXiv 2310.05737).

    Args:
        rows: (n, dim), latents. Where they need more than 17 million distances, only every second, third, ... counts.
        vectors: (size, dim), codes.
        metric: Any that goes by distance.

    Returns:
        A scalar with gradients to both: -1 where each assignment is certain and all codes are used alike, 0 where
        assignments carry no information.
    """
    assert metric.is_distance, "inner products are no distances"
    if len(vectors) == 1:
        return rows.new_zeros(())
    rows = rows[:: -(-len(rows) * len(vectors) // _AT_MOST)]
    rows, vectors = metric.prepare(rows), metric.prepare(vectors)
    distances = (rows.square().sum(1, keepdim=True) - 2 * rows @ vectors.T + vectors.square().sum(1)).relu()
    constant = distances.detach()
    temperature = _TEMPERATURE * constant.amin(1).mean() + 1e-6 * constant.mean()  # latents may lie on their codes
    choices = torch.log_softmax(-distances / temperature.clamp(min=1e-12), 1)
    together = torch.logsumexp(choices, 0) - math.log(len(rows))
    return (_entropy(choices).mean() - _entropy(together)) / math.log(len(vectors))


def _entropy(logs: Tensor) -> Tensor:
    """Of distributions (..., size) by their logarithms."""
    return -(logs.exp() * logs.clamp(min=-1e4)).sum(-1)
