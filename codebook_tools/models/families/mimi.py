"""MimiModel of the transformers library: the codec of Moshi and CSM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.checkpoints.tensors import Shapes
from codebook_tools.models.families._transformers import CONFIG_KEY, built, file_key, prefix_of, pretrained
from codebook_tools.models.family import Family

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


def make(shapes: Shapes, checkpoint: Checkpoint) -> Module:
    """The library's own network after the config."""
    from codebook_tools.models.networks.mimi import Mimi

    return built(shapes, checkpoint, "MimiModel", Mimi)


def load(folder: Path) -> tuple[Module, list[str], list[str]]:
    """The network as transformers loads it."""
    from codebook_tools.models.networks.mimi import Mimi

    return pretrained(folder, "MimiModel", Mimi)


FAMILY = Family(
    prefix=lambda checkpoint: prefix_of(checkpoint, "mimi", _AXES),
    make=make,
    file_key=lambda name, shapes: file_key(name, shapes, _FLAT),
    config_key=CONFIG_KEY,
    power_of_two=True,
    pretrained=load,
)
