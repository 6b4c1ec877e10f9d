"""Residual quantisation of waveforms: what all codecs that stack their codebooks have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from codebook_tools.models.network import Quantise


class Encoded(NamedTuple):
    """latents: (n, dim, positions), quantised or not. samples: how many the waveforms had."""

    latents: Tensor
    samples: int


def residual(latents: Tensor, stages: Iterable[int], quantise: Quantise) -> Tensor:
    """The sum, of the shape of `latents`, of what each stage makes of what the stages before it have left."""
    left, total = latents, latents.new_zeros(())
    for stage in stages:
        quantised = quantise(stage, left)
        left, total = left - quantised, total + quantised
    return total


def fitted(waveforms: Tensor, samples: int) -> Tensor:
    """waveforms (n, channels, any) cut to `samples`, or with silence after them where they are shorter."""
    return functional.pad(waveforms, (0, samples - waveforms.shape[-1]))
