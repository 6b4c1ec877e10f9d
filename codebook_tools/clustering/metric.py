"""The metrics by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from codebook_tools.codebook import EUCLIDEAN, Codebook, Metric

if TYPE_CHECKING:  # a header is read, and its metric named, without torch
    from torch import Tensor


def unit(rows: Tensor) -> Tensor:
    """Rows (n, dim) at Euclidean length 1; those shorter than 1e-12 stay shorter, as in models, and zeros stay."""
    from torch.nn.functional import normalize

    return normalize(rows, dim=-1)


COSINE = Metric("cosine", "cosine", prepare=unit, by_direction=True)
COSINE_UNIT = Metric("cosine-unit", "cosine", prepare=unit, emit=unit, by_direction=True)
DOT = Metric("dot", "dot", is_distance=False)

METRICS = {metric.name: metric for metric in (EUCLIDEAN, COSINE, COSINE_UNIT, DOT)}


def prepared(codebook: Codebook) -> Codebook:
    """The codebook of the prepared codes, to be searched with prepared latents; the same one for inner products."""
    metric = codebook.metric
    if not metric.is_distance:
        return codebook
    return Codebook(metric.prepare(codebook.vectors), COSINE_UNIT if metric.by_direction else EUCLIDEAN)
