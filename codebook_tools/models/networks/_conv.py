"""Convolutions of the tutorials' networks, and the activations between them, built from the shapes of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from codebook_tools.checkpoints.tensors import Shapes
from codebook_tools.checkpoints.weight_norm import LENGTH, OLDER, weight_shape
from codebook_tools.errors import CodebookError


def convolution(shapes: Shapes, name: str, transposed: bool = False) -> nn.Module:
    """A fresh convolution with the bias and the weight norm that the file has.

    Shapes do not tell stride and padding: in all these tutorials an even kernel halves the sides, or, transposed,
    doubles them, and an odd one keeps them.

    Args:
        shapes: Of the file's tensors, by key without prefix.
        name: Of the layer.
        transposed: Whether it is a transposed convolution.

    Raises:
        CodebookError: The file has no such weight.
    """
    shape = weight_shape(shapes, name)
    if shape is None:
        raise CodebookError(f"the file lacks {name}.weight, which the layout has")
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    channels = (shape[0], shape[1]) if transposed else (shape[1], shape[0])
    side = shape[2]
    module: nn.Module = kind(
        *channels, side, stride=1 if side % 2 else 2, padding=(side - 1) // 2, bias=f"{name}.bias" in shapes
    )
    lengths = shapes.get(name + LENGTH) or shapes.get(name + OLDER[LENGTH])
    if lengths is not None:  # the newer weight norm for both: a family's `file_key` gives back the older one's names
        axis = next((axis for axis, length in enumerate(lengths) if length > 1), 0)
        module = nn.utils.parametrizations.weight_norm(module, dim=axis)
    return module


def decoding(shapes: Shapes, name: str) -> nn.Module:
    """A convolution of a decoder, transposed where its kernel is even."""
    return convolution(shapes, name, transposed=shapes[f"{name}.weight"][2] % 2 == 0)


def sequence(
    shapes: Shapes, name: str, kinds: Mapping[str, Callable[[str], nn.Module]], between: Callable[[], nn.Module]
) -> nn.Sequential:
    """The layers name.0, name.1, ... up to the last that has tensors; those without tensors are activations.

    Args:
        shapes: Of the file's tensors, by key without prefix.
        name: Of the sequence.
        kinds: (name of a layer) -> the layer, by the ending of a key that only layers of that kind have.
        between: Makes an activation.
    """
    last = max(int(key[len(name) + 1 :].partition(".")[0]) for key in shapes if key.startswith(f"{name}."))
    layers = []
    for layer in (f"{name}.{i}" for i in range(last + 1)):
        make = next((make for ending, make in kinds.items() if layer + ending in shapes), None)
        layers.append(make(layer) if make else between())
    return nn.Sequential(*layers)
