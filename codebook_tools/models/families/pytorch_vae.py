"""The layout of the VQVAE of AntixK/PyTorch-VAE: any number of halvings and of residual layers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.checkpoints.tensors import Shapes
from codebook_tools.models.families import _conv_layout
from codebook_tools.models.families._conv_layout import kernels
from codebook_tools.models.family import Family

if TYPE_CHECKING:
    from torch.nn import Module

CODEBOOK = "vq_layer.embedding.weight"
_LAYER = re.compile(r"\d+\.(0\.(weight|bias)|resblock\.[02]\.weight)")
_ORDER = re.compile(r"(4+)3(31)*1\|3(31)*\1")  # kernels of encoder and decoder


def prefix_of(shapes: Shapes) -> str | None:
    """What precedes the layout's own key names ("", "model.", ...); None for another layout."""
    prefix = _conv_layout.prefix_of(shapes, CODEBOOK, {"encoder.0.0": 4, "decoder.0.0": 3})
    if prefix is None:
        return None
    sides = [f"{prefix}{side}." for side in ("encoder", "decoder")]
    order = "|".join(kernels(shapes, side) for side in sides)
    inside = (key.removeprefix(side) for side in sides for key in shapes if key.startswith(side))
    fits = _ORDER.fullmatch(order) and all(map(_LAYER.fullmatch, inside))
    return prefix if fits else None


def make(shapes: Shapes, _: Checkpoint) -> Module:
    """A fresh network for the shapes."""
    from codebook_tools.models.networks.pytorch_vae import PyTorchVQVAE

    return PyTorchVQVAE(shapes, shapes[CODEBOOK])


FAMILY = Family(prefix=lambda checkpoint: prefix_of(checkpoint.shapes), make=make)
