"""Weight normalization: a weight stored as a direction and a length, under one of two pairs of names of torch."""

from __future__ import annotations

from codebook_tools.checkpoints.tensors import Shape, Shapes

LENGTH, DIRECTION = ".parametrizations.weight.original0", ".parametrizations.weight.original1"
OLDER = {LENGTH: ".weight_g", DIRECTION: ".weight_v"}
"""The ending of a key in torch's newer weight norm, and that in its older one; the newer one loads both."""


def weight_shape(shapes: Shapes, name: str) -> Shape | None:
    """The shape of a layer's weight, stored plain or in either pair; None where the file has no such layer."""
    stored = (name + ending for ending in (".weight", DIRECTION, OLDER[DIRECTION]))
    return next((shapes[key] for key in stored if key in shapes), None)
