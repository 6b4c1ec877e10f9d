"""XcodecModel of the transformers library: X-Codec."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.checkpoints.tensors import Shapes
from codebook_tools.checkpoints.weight_norm import OLDER
from codebook_tools.models.families._bandwidths import bandwidths
from codebook_tools.models.families._transformers import CONFIG_KEY, built, file_key, prefix_of, pretrained
from codebook_tools.models.family import Family

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


def make(shapes: Shapes, checkpoint: Checkpoint) -> Module:
    """The library's own network after the config."""
    from codebook_tools.models.networks.xcodec import Xcodec

    return built(shapes, checkpoint, "XcodecModel", Xcodec)


def load(folder: Path) -> tuple[Module, list[str], list[str]]:
    """The network as transformers loads it."""
    from codebook_tools.models.networks.xcodec import Xcodec

    return pretrained(folder, "XcodecModel", Xcodec)


FAMILY = Family(
    prefix=lambda checkpoint: prefix_of(checkpoint, "xcodec", _AXES),
    make=make,
    file_key=lambda name, shapes: file_key(name, shapes, OLDER),
    config_key=CONFIG_KEY,
    follow=lambda config, size: bandwidths(config, size, _DEFAULT_BANDWIDTHS),
    pretrained=load,
)
