"""EncodecModel of the transformers library: EnCodec, and the codec of MusicGen."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from codebook_tools.checkpoints.weight_norm import OLDER
from codebook_tools.models.families._bandwidths import bandwidths
from codebook_tools.models.families._transformers import codec

if TYPE_CHECKING:
    from torch.nn import Module

_AXES = {
    "quantizer.layers.0.codebook.embed": 2,
    "quantizer.layers.0.codebook.embed_avg": 2,
    "encoder.layers.0.conv.bias": 1,
    "decoder.layers.0.conv.bias": 1,
}
_DEFAULT_BANDWIDTHS = (1.5, 3.0, 6.0, 12.0, 24.0)  # the library's, for a config that does not say


def _network() -> Callable[[Any], Module]:
    from codebook_tools.models.networks.encodec import Encodec

    return Encodec


FAMILY = codec(
    "encodec",
    _AXES,
    _network,
    OLDER,
    power_of_two=True,
    follow=lambda config, size: bandwidths(config, size, _DEFAULT_BANDWIDTHS),
)
