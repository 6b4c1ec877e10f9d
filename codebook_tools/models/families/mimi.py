"""MimiModel of the transformers library: the codec of Moshi and CSM."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from codebook_tools.models.families._transformers import codec

if TYPE_CHECKING:
    from torch.nn import Module

_AXES = {
    "quantizer.semantic_residual_vector_quantizer.layers.0.codebook.embed_sum": 2,
    "quantizer.acoustic_residual_vector_quantizer.layers.0.codebook.embed_sum": 2,
    "encoder.layers.0.conv.weight": 3,
    "decoder.layers.0.conv.weight": 3,
}


_FLAT = {
    "encoder.encoder_seanet.": "encoder.",
    "encoder.encoder_transformer.": "encoder_transformer.",
    "encoder.downsample.": "downsample.",
    "decoder.upsample.": "upsample.",
    "decoder.decoder_transformer.": "decoder_transformer.",
    "decoder.decoder_seanet.": "decoder.",
}
"""Files keep the names of before the library gave each half a module of its own, whoever writes them."""


def _network() -> Callable[[Any], Module]:
    from codebook_tools.models.networks.mimi import Mimi

    return Mimi


FAMILY = codec("mimi", _AXES, _network, _FLAT, power_of_two=True)
