"""XcodecModel of the transformers library: X-Codec."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from codebook_tools.checkpoints.weight_norm import OLDER
from codebook_tools.models.families._bandwidths import bandwidths
from codebook_tools.models.families._transformers import codec

if TYPE_CHECKING:
    from torch.nn import Module

_AXES = {
    "quantizer.quantizers.0.codebook.embed": 2,
    "acoustic_encoder.conv1.weight": 3,
    "acoustic_decoder.conv1.weight": 3,
    "encoder_semantic.conv.weight": 3,
    "fc.weight": 2,
    "fc2.weight": 2,
}
_DEFAULT_BANDWIDTHS = (0.5, 1, 1.5, 2, 4)  # the library's, for a config that does not say


def _network() -> Callable[[Any], Module]:
    from codebook_tools.models.networks.xcodec import Xcodec

    return Xcodec


FAMILY = codec(
    "xcodec",
    _AXES,
    _network,
    OLDER,
    follow=lambda config, size: bandwidths(config, size, _DEFAULT_BANDWIDTHS),
)
