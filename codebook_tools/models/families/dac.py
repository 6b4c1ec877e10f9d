"""DacModel of the transformers library: the Descript Audio Codec."""

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
    "quantizer.quantizers.0.codebook.weight": 2,
    "quantizer.quantizers.0.in_proj.weight": 3,
    "quantizer.quantizers.0.out_proj.weight": 3,
    "encoder.conv1.weight": 3,
    "decoder.conv1.weight": 3,
}


def make(shapes: Shapes, checkpoint: Checkpoint) -> Module:
    """The library's own network after the config."""
    from codebook_tools.models.networks.dac import Dac

    return built(shapes, checkpoint, "DacModel", Dac)


def load(folder: Path) -> tuple[Module, list[str], list[str]]:
    """The network as transformers loads it."""
    from codebook_tools.models.networks.dac import Dac

    return pretrained(folder, "DacModel", Dac)


FAMILY = Family(
    prefix=lambda checkpoint: prefix_of(checkpoint, "dac", _AXES),
    make=make,
    file_key=lambda name, shapes: file_key(name, shapes, {}),
    metric="cosine",
    config_key=CONFIG_KEY,
    power_of_two=True,
    pretrained=load,
)
