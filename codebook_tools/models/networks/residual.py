"""Residual quantization of waveforms, as in all codecs with several codebooks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from codebook_tools.models.network import Quantize


class Encoded(NamedTuple):
    """Encoded waveforms.

    Attributes:
        latents: (n, dim, positions), quantized or not.
        samples: Length of the waveforms.
    """

    latents: Tensor
    samples: int


def residual(latents: Tensor, stages: Iterable[int], quantize: Quantize) -> Tensor:
    """Quantize latents (n, dim, *grid) in residual stages, each by its nearest code: the greedy Search.

    Args:
        latents: Those of the first stage.
        stages: Indices that `quantize` is called with, in order.
        quantize: As in `Walking.walk`.

    Returns:
        The sum of the quantized residuals, of the shape of `latents`.
    """
    left, total = latents, latents.new_zeros(())
    for stage in stages:
        quantized = quantize(stage, left)
        left, total = left - quantized, total + quantized
    return total


def fitted(waveforms: Tensor, samples: int) -> Tensor:
    """waveforms (n, channels, any) cut, or padded with zeros, to `samples`."""
    return functional.pad(waveforms, (0, samples - waveforms.shape[-1]))
