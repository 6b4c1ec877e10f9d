"""EncodecModel of the transformers library: EnCodec, and the codec of MusicGen."""

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
    "quantizer.layers.0.codebook.embed": 2,
    "quantizer.layers.0.codebook.embed_avg": 2,
    "encoder.layers.0.conv.bias": 1,
    "decoder.layers.0.conv.bias": 1,
}
_DEFAULT_BANDWIDTHS = (1.5, 3.0, 6.0, 12.0, 24.0)  # the library's, for a config that does not say


def make(shapes: Shapes, checkpoint: Checkpoint) -> Module:
    """The library's own network after the config."""
    from codebook_tools.models.networks.encodec import Encodec

    return built(shapes, checkpoint, "EncodecModel", Encodec)


def load(folder: Path) -> tuple[Module, list[str], list[str]]:
    """The network as transformers loads it."""
    from codebook_tools.models.networks.encodec import Encodec

    return pretrained(folder, "EncodecModel", Encodec)


FAMILY = Family(
    prefix=lambda checkpoint: prefix_of(checkpoint, "encodec", _AXES),
    make=make,
    file_key=lambda name, shapes: file_key(name, shapes, OLDER),
    config_key=CONFIG_KEY,
    power_of_two=True,
    follow=lambda config, size: bandwidths(config, size, _DEFAULT_BANDWIDTHS),
    pretrained=load,
)
