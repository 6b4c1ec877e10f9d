"""Weights stored as a direction and a length: torch has had two pairs of names for the two tensors."""

from __future__ import annotations

from codebook_tools.checkpoints.tensors import Shape, Shapes

LENGTH, DIRECTION = ".parametrizations.weight.original0", ".parametrizations.weight.original1"
OLDER = {LENGTH: ".weight_g", DIRECTION: ".weight_v"}
"""How a key ends with torch's newer weight norm, and how with its older one; the newer reads both."""


def weight_shape(shapes: Shapes, name: str) -> Shape | None:
    """Of a layer's weight, stored plain or in either pair; None where the file has no such layer."""
    stored = (name + ending for ending in (".weight", DIRECTION, OLDER[DIRECTION]))
    return next((shapes[key] for key in stored if key in shapes), None)
