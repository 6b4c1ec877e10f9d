"""Convolutions of the tutorials' networks, and what stands between them, told from the shapes of their weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import nn

from codebook_tools.errors import CodebookError
from codebook_tools.models.family import Shapes

# A convolution's weight is stored plain, or weight-normed by either of torch's two implementations. The network uses
# the newer one for both; `file_key` gives back the older one's names.
_DIRECTION, _LENGTH = ".parametrizations.weight.original1", ".parametrizations.weight.original0"
_OLDER = {_DIRECTION: ".weight_v", _LENGTH: ".weight_g"}


def convolution(shapes: Shapes, name: str, transposed: bool = False) -> nn.Module:
    """A fresh convolution with the bias and the weight norm that the file has.

    Stride and padding are no shapes: in all these tutorials an even kernel halves the sides, or, transposed, doubles
    them, and an odd one keeps them. Raises CodebookError where the file has no such weight.
    """
    shape = _weight_shape(shapes, name)
    if shape is None:
        raise CodebookError(f"the file lacks {name}.weight, which the layout has")
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    channels = (shape[0], shape[1]) if transposed else (shape[1], shape[0])
    side = shape[2]
    module: nn.Module = kind(
        *channels, side, stride=1 if side % 2 else 2, padding=(side - 1) // 2, bias=f"{name}.bias" in shapes
    )
    lengths = shapes.get(name + _LENGTH) or shapes.get(name + _OLDER[_LENGTH])
    if lengths is not None:
        axis = next((axis for axis, length in enumerate(lengths) if length > 1), 0)
        module = nn.utils.parametrizations.weight_norm(module, dim=axis)
    return module


def decoding(shapes: Shapes, name: str) -> nn.Module:
    """A convolution of a decoder in which those of even kernel are transposed."""
    return convolution(shapes, name, transposed=shapes[f"{name}.weight"][2] % 2 == 0)


def sequence(
    shapes: Shapes, name: str, kinds: Mapping[str, Callable[[str], nn.Module]], between: Callable[[], nn.Module]
) -> nn.Sequential:
    """The layers name.0, name.1, ... up to the last that has tensors; those that have none are activations.

    kinds: what makes a layer of its name, by the ending of a key that only layers of the kind have.
    """
    last = max(int(key[len(name) + 1 :].partition(".")[0]) for key in shapes if key.startswith(f"{name}."))
    layers = []
    for layer in (f"{name}.{i}" for i in range(last + 1)):
        make = next((make for ending, make in kinds.items() if layer + ending in shapes), None)
        layers.append(make(layer) if make else between())
    return nn.Sequential(*layers)


def prefix_of(shapes: Shapes, codebook: str, sides: Mapping[str, int]) -> str | None:
    """What stands before a layout's own key names ("", "module.", ...); None where this is another layout.

    codebook: a key that the layout has. sides: of the kernels of convolutions that it has, by name.
    """
    key = next((key for key in shapes if key == codebook or key.endswith("." + codebook)), None)
    if key is None:
        return None
    prefix = key.removesuffix(codebook)
    found = {name: _weight_shape(shapes, prefix + name) for name in sides}
    fits = all(shape is not None and shape[2:] == (sides[name],) * 2 for name, shape in found.items())
    return prefix if fits else None


def kernels(shapes: Shapes, prefix: str) -> str:
    """The sides of all kernels whose keys begin so, in the order of the layers: "443" for two of 4x4, one of 3x3."""
    weights = [key for key, shape in shapes.items() if key.startswith(prefix) and len(shape) == 4]
    weights.sort(key=lambda key: [int(digits) for digits in re.findall(r"\d+", key)])
    return "".join(str(shapes[key][2]) for key in weights)


def file_key(name: str, shapes: Shapes) -> str:
    """The key under which the file holds what a network of these convolutions calls `name`."""
    for newer, older in _OLDER.items():
        if name.endswith(newer) and name not in shapes:
            return name.removesuffix(newer) + older
    return name


def _weight_shape(shapes: Shapes, name: str) -> tuple[int, ...] | None:
    stored = (name + ending for ending in (".weight", _DIRECTION, _OLDER[_DIRECTION]))
    return next((shapes[key] for key in stored if key in shapes), None)
