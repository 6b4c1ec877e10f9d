"""DacModel of the transformers library: the Descript Audio Codec."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from codebook_tools.models.families._transformers import codec

if TYPE_CHECKING:
    from torch.nn import Module

_AXES = {
    "quantizer.quantizers.0.codebook.weight": 2,
    "quantizer.quantizers.0.in_proj.weight": 3,
    "quantizer.quantizers.0.out_proj.weight": 3,
    "encoder.conv1.weight": 3,
    "decoder.conv1.weight": 3,
}


def _network() -> Callable[[Any], Module]:
    from codebook_tools.models.networks.dac import Dac

    return Dac


FAMILY = codec("dac", _AXES, _network, metric="cosine", power_of_two=True)
