"""The layout of the zalando tutorial (zalandoresearch/pytorch-vq-vae) and its many copies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.checkpoints.tensors import Shapes
from codebook_tools.models.families import _conv_layout
from codebook_tools.models.families._conv_layout import file_key
from codebook_tools.models.family import Family

if TYPE_CHECKING:
    from torch.nn import Module

CODEBOOK = "_vq_vae._embedding.weight"
KERNELS = {"_encoder._conv_1": 4, "_encoder._conv_2": 4, "_encoder._conv_3": 3, "_pre_vq_conv": 1,
           "_decoder._conv_1": 3, "_decoder._conv_trans_1": 4, "_decoder._conv_trans_2": 4}  # fmt: skip


def prefix_of(shapes: Shapes) -> str | None:
    """What precedes the layout's own key names ("", "module.", ...); None for another layout."""
    return _conv_layout.prefix_of(shapes, CODEBOOK, KERNELS)


def make(shapes: Shapes, _: Checkpoint) -> Module:
    """A fresh network for the shapes."""
    from codebook_tools.models.networks.zalando import ZalandoVQVAE

    return ZalandoVQVAE(shapes, shapes[CODEBOOK])


FAMILY = Family(prefix=lambda checkpoint: prefix_of(checkpoint.shapes), make=make, file_key=file_key)
