"""The VQ-VAE-2 of rosinality/vq-vae-2-pytorch: two levels, the lower one encoded given the codes of the upper.

Channels, residual blocks and both codebooks are told from the shapes. Stride, padding and activations are the published
code's, and they changed once: until January 2021 a residual block began with an in-place ReLU, so that its skip path
carried relu(x). A file does not say with which of the two it was trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from codebook_tools.checkpoints.reading import Checkpoint
from codebook_tools.models import convolutions
from codebook_tools.models.convolutions import convolution, decoding, kernels, sequence
from codebook_tools.models.family import Family, Quantise, Shapes

TOP, BOTTOM = "quantize_t.embed", "quantize_b.embed"
_KERNELS = {"enc_b.blocks.0": 4, "enc_t.blocks.0": 4, "quantize_conv_t": 1, "dec_t.blocks.0": 3,
            "quantize_conv_b": 1, "upsample_t": 4, "dec.blocks.0": 3}  # fmt: skip
_BLOCK = re.compile(r"\d+\.(conv\.[13]\.)?(weight|bias)")
_ORDER = re.compile(r"(4+)3(31)*\|43(31)*\|3(31)*4\|3(31)*\1")  # kernels of enc_b, enc_t, dec_t, dec


class ResBlock(nn.Module):
    """skip(x) + conv(relu(x)). rectified: whether the skip path carries relu(x), not x."""

    def __init__(self, shapes: Shapes, rectified: bool, name: str) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.ReLU(), convolution(shapes, f"{name}.conv.1"), nn.ReLU(), convolution(shapes, f"{name}.conv.3")
        )
        self.rectified = rectified

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.conv(x)
        return changed + (functional.relu(x) if self.rectified else x)


class Coder(nn.Module):
    """An encoder or a decoder: `layer` makes its plain convolutions."""

    def __init__(self, shapes: Shapes, name: str, rectified: bool, layer: Callable[[Shapes, str], nn.Module]) -> None:
        super().__init__()
        kinds: dict[str, Callable[[str], nn.Module]] = {
            ".weight": partial(layer, shapes),
            ".conv.1.weight": partial(ResBlock, shapes, rectified),
        }
        self.blocks = sequence(shapes, f"{name}.blocks", kinds, nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x)
        return out


class RosinalityVQVAE2(nn.Module):
    """shapes: by key, of a checkpoint in this layout. rectified: as in its residual blocks until January 2021."""

    codebooks = (TOP, BOTTOM)

    def __init__(self, shapes: Shapes, rectified: bool) -> None:
        super().__init__()
        self.enc_b = Coder(shapes, "enc_b", rectified, convolution)
        self.enc_t = Coder(shapes, "enc_t", rectified, convolution)
        self.quantize_conv_t = convolution(shapes, "quantize_conv_t")
        self.quantize_t = _quantiser(shapes[TOP])
        self.dec_t = Coder(shapes, "dec_t", rectified, decoding)
        self.quantize_conv_b = convolution(shapes, "quantize_conv_b")
        self.quantize_b = _quantiser(shapes[BOTTOM])
        self.upsample_t = convolution(shapes, "upsample_t", transposed=True)
        self.dec = Coder(shapes, "dec", rectified, decoding)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (n, channels, height, width), sides in eights -> top latents (n, dim, height/8, width/8), and
        features of the bottom level (n, channels, height/4, width/4)."""
        features = functional.relu(self.enc_b(images))  # an encoder ends in a ReLU, which has no key
        return self.quantize_conv_t(functional.relu(self.enc_t(features))), features

    def walk(self, encoded: tuple[Tensor, Tensor], quantise: Quantise) -> tuple[Tensor, Tensor]:
        """Top latents and features -> what the decoder gets of the codes of both levels."""
        latents, features = encoded
        top = quantise(0, latents)
        return top, quantise(1, self.quantize_conv_b(torch.cat([self.dec_t(top), features], 1)))

    def decode(self, quantised: tuple[Tensor, Tensor]) -> Tensor:
        """(n, dim, height/8, width/8), (n, dim, height/4, width/4) -> images (n, channels, height, width)."""
        top, bottom = quantised
        images: Tensor = self.dec(torch.cat([self.upsample_t(top), bottom], 1))
        return images


def _quantiser(shape: tuple[int, ...]) -> nn.Module:
    """The owner of a codebook of (dim, size), as the tutorial initialises it."""
    module = nn.Module()
    module.embed = nn.Parameter(torch.randn(shape))
    return module


def prefix_of(shapes: Shapes) -> str | None:
    """What stands before the layout's own key names ("", "module.", ...); None where this is another layout."""
    prefix = convolutions.prefix_of(shapes, TOP, _KERNELS)
    if prefix is None or len(shapes.get(prefix + BOTTOM, ())) != 2:
        return None
    sides = [f"{prefix}{side}.blocks." for side in ("enc_b", "enc_t", "dec_t", "dec")]
    order = "|".join(kernels(shapes, side) for side in sides)
    inside = (key.removeprefix(side) for side in sides for key in shapes if key.startswith(side))
    fits = _ORDER.fullmatch(order) and all(map(_BLOCK.fullmatch, inside))
    return prefix if fits else None


def _prefix(checkpoint: Checkpoint) -> str | None:
    return prefix_of(checkpoint.shapes)


_CAVEAT = (
    "files from before 2021-01-23 rectify the skip path of their residual blocks, and do not say so: "
    "if reconstructions are poor, try --family rosinality-2019"
)
FAMILY = Family(
    prefix=_prefix,
    make=lambda shapes, _: RosinalityVQVAE2(shapes, rectified=False),
    axis=1,
    caveat=lambda _: _CAVEAT,
)
FAMILY_OF_2019 = Family(prefix=_prefix, make=lambda shapes, _: RosinalityVQVAE2(shapes, rectified=True), axis=1)
"""For files trained before January 2021. None is recognised as such: it must be named."""
