"""The layout of the VQ-VAE-2 of rosinality/vq-vae-2-pytorch.

The network's residual blocks changed in January 2021, and a file does not say which ones it was trained with.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.checkpoints.tensors import Shapes
from codebook_tools.models.families import _conv_layout
from codebook_tools.models.families._conv_layout import kernels
from codebook_tools.models.family import Family

if TYPE_CHECKING:
    from torch.nn import Module

TOP, BOTTOM = "quantize_t.embed", "quantize_b.embed"
_KERNELS = {"enc_b.blocks.0": 4, "enc_t.blocks.0": 4, "quantize_conv_t": 1, "dec_t.blocks.0": 3,
            "quantize_conv_b": 1, "upsample_t": 4, "dec.blocks.0": 3}  # fmt: skip
_BLOCK = re.compile(r"\d+\.(conv\.[13]\.)?(weight|bias)")
_ORDER = re.compile(r"(4+)3(31)*\|43(31)*\|3(31)*4\|3(31)*\1")  # kernels of enc_b, enc_t, dec_t, dec


def prefix_of(shapes: Shapes) -> str | None:
    """What precedes the layout's own key names ("", "module.", ...); None for another layout."""
    prefix = _conv_layout.prefix_of(shapes, TOP, _KERNELS)
    if prefix is None or len(shapes.get(prefix + BOTTOM, ())) != 2:
        return None
    sides = [f"{prefix}{side}.blocks." for side in ("enc_b", "enc_t", "dec_t", "dec")]
    order = "|".join(kernels(shapes, side) for side in sides)
    inside = (key.removeprefix(side) for side in sides for key in shapes if key.startswith(side))
    fits = _ORDER.fullmatch(order) and all(map(_BLOCK.fullmatch, inside))
    return prefix if fits else None


def make(shapes: Shapes, _: Checkpoint, rectified: bool) -> Module:
    """A fresh network for the shapes.

    Args:
        shapes: Without the prefix.
        rectified: Whether skip paths carry relu(x), as until January 2021.
    """
    from codebook_tools.models.networks.rosinality import RosinalityVQVAE2

    return RosinalityVQVAE2(shapes, (TOP, BOTTOM), rectified)


def _prefix(checkpoint: Checkpoint) -> str | None:
    return prefix_of(checkpoint.shapes)


_CAVEAT = (
    "files from before 2021-01-23 rectify the skip path of their residual blocks, and do not say so: "
    "if reconstructions are poor, try --family rosinality-2019"
)
FAMILY = Family(
    prefix=_prefix,
    make=partial(make, rectified=False),
    axis=1,
    caveats=lambda _: (_CAVEAT,),
)
FAMILY_OF_2019 = Family(prefix=_prefix, make=partial(make, rectified=True), axis=1)
"""For files trained before January 2021: not recognized, it must be named."""
