"""Layouts of the tutorials, recognized by names and shapes of their convolutions."""

from __future__ import annotations

import re
from collections.abc import Mapping

from codebook_tools.checkpoints.tensors import Shapes
from codebook_tools.checkpoints.weight_norm import OLDER, weight_shape


def prefix_of(shapes: Shapes, codebook: str, sides: Mapping[str, int]) -> str | None:
    """What precedes a layout's own key names ("", "module.", ...); None for another layout.

    Args:
        shapes: Of the file's tensors, by key.
        codebook: A key of the layout.
        sides: Of the kernels of its convolutions, by name.
    """
    key = next((key for key in shapes if key == codebook or key.endswith("." + codebook)), None)
    if key is None:
        return None
    prefix = key.removesuffix(codebook)
    kernels = {name: weight_shape(shapes, prefix + name) for name in sides}
    fits = all(shape is not None and shape[2:] == (sides[name],) * 2 for name, shape in kernels.items())
    return prefix if fits else None


def kernels(shapes: Shapes, prefix: str) -> str:
    """The sides of all kernels under a prefix, in the order of the layers: "443" for two of 4x4, one of 3x3."""
    weights = [key for key, shape in shapes.items() if key.startswith(prefix) and len(shape) == 4]
    weights.sort(key=lambda key: [int(digits) for digits in re.findall(r"\d+", key)])
    return "".join(str(shapes[key][2]) for key in weights)


def file_key(name: str, shapes: Shapes) -> str:
    """The file's key of the tensor that a network of these convolutions calls `name`."""
    for newer, older in OLDER.items():
        if name.endswith(newer) and name not in shapes:
            return name.removesuffix(newer) + older
    return name
