"""The layout of MishaLaskin/vqvae: the zalando tutorial's under other names, its first decoding layer transposed.

Its residual blocks begin with an in-place ReLU, too, so the skip path carries relu(x); each stack repeats one layer.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.checkpoints.tensors import Shapes
from codebook_tools.models.families import _conv_layout, zalando
from codebook_tools.models.family import Family

if TYPE_CHECKING:
    from torch.nn import Module

_NAMES = {
    "_encoder._conv_1.": "encoder.conv_stack.0.",
    "_encoder._conv_2.": "encoder.conv_stack.2.",
    "_encoder._conv_3.": "encoder.conv_stack.4.",
    "_encoder._residual_stack._layers.": "encoder.conv_stack.5.stack.",
    "_pre_vq_conv.": "pre_quantization_conv.",
    "_vq_vae._embedding.": "vector_quantization.embedding.",
    "_decoder._conv_1.": "decoder.inverse_conv_stack.0.",
    "_decoder._residual_stack._layers.": "decoder.inverse_conv_stack.1.stack.",
    "_decoder._conv_trans_1.": "decoder.inverse_conv_stack.2.",
    "_decoder._conv_trans_2.": "decoder.inverse_conv_stack.4.",
    "._block.": ".res_block.",
}
"""Parts of key names: zalando's, and this tutorial's."""


def prefix_of(shapes: Shapes) -> str | None:
    """What precedes the layout's own key names; None for another layout."""
    sides = {_theirs(f"{name}.").removesuffix("."): side for name, side in zalando.KERNELS.items()}
    return _conv_layout.prefix_of(shapes, _theirs(zalando.CODEBOOK), sides)


def make(shapes: Shapes, checkpoint: Checkpoint) -> Module:
    """A fresh network for the shapes, with the shared layers that the file has only once."""
    from codebook_tools.models.networks.zalando import ZalandoVQVAE

    # safetensors' save_model writes a shared tensor once, and its other names into the metadata.
    prefix = prefix_of(checkpoint.shapes) or ""
    shared = {
        name.removeprefix(prefix): shapes[kept.removeprefix(prefix)]
        for name, kept in checkpoint.metadata.items()
        if kept.removeprefix(prefix) in shapes
    }
    ours = {_ours(key): shape for key, shape in {**shapes, **shared}.items()}
    return ZalandoVQVAE(ours, ours[zalando.CODEBOOK], transposed=True)


def file_key(name: str, shapes: Shapes) -> str:
    """The file's key of the tensor that the network calls `name`; a shared layer's for each repeat."""
    key = _theirs(name)
    return key if key in shapes else re.sub(r"\.stack\.\d+\.", ".stack.0.", key)


def _theirs(name: str) -> str:
    for ours, theirs in _NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _ours(key: str) -> str:
    for ours, theirs in _NAMES.items():
        key = key.replace(theirs, ours)
    return key


FAMILY = Family(prefix=lambda checkpoint: prefix_of(checkpoint.shapes), make=make, file_key=file_key)
