"""The VQ-VAE-2 of rosinality/vq-vae-2-pytorch: two levels, the lower one encoded given the codes of the upper.

Shapes tell channels, residual blocks and both codebooks. Stride, padding and activations are the published code's,
which changed once: until January 2021 a residual block began with an in-place ReLU, so that its skip path carried
relu(x).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from codebook_tools.checkpoints.tensors import Shapes
from codebook_tools.models.network import Quantize
from codebook_tools.models.networks._conv import convolution, decoding, sequence


class ResBlock(nn.Module):
    """skip(x) + conv(relu(x)), where skip is relu if `rectified`, else the identity."""

    def __init__(self, shapes: Shapes, rectified: bool, name: str) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.ReLU(), convolution(shapes, f"{name}.conv.1"), nn.ReLU(), convolution(shapes, f"{name}.conv.3")
        )
        self.rectified = rectified

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) -> the same shape."""
        changed: Tensor = self.conv(x)
        return changed + (functional.relu(x) if self.rectified else x)


class Coder(nn.Module):
    """An encoder or a decoder, whose plain convolutions `layer` makes."""

    def __init__(self, shapes: Shapes, name: str, rectified: bool, layer: Callable[[Shapes, str], nn.Module]) -> None:
        super().__init__()
        kinds: dict[str, Callable[[str], nn.Module]] = {
            ".weight": partial(layer, shapes),
            ".conv.1.weight": partial(ResBlock, shapes, rectified),
        }
        self.blocks = sequence(shapes, f"{name}.blocks", kinds, nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) -> the same, with other channels and sides."""
        out: Tensor = self.blocks(x)
        return out


class RosinalityVQVAE2(nn.Module):
    """The network for the shapes of a checkpoint in this layout.

    Args:
        shapes: By key.
        codebooks: Keys of the upper level's and the lower level's.
        rectified: Whether residual blocks are those of before January 2021.
    """

    def __init__(self, shapes: Shapes, codebooks: tuple[str, str], rectified: bool) -> None:
        super().__init__()
        self.codebooks = codebooks
        self.enc_b = Coder(shapes, "enc_b", rectified, convolution)
        self.enc_t = Coder(shapes, "enc_t", rectified, convolution)
        self.quantize_conv_t = convolution(shapes, "quantize_conv_t")
        self.quantize_t = _quantizer(shapes[codebooks[0]])
        self.dec_t = Coder(shapes, "dec_t", rectified, decoding)
        self.quantize_conv_b = convolution(shapes, "quantize_conv_b")
        self.quantize_b = _quantizer(shapes[codebooks[1]])
        self.upsample_t = convolution(shapes, "upsample_t", transposed=True)
        self.dec = Coder(shapes, "dec", rectified, decoding)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (n, channels, height, width), whose sides are multiples of 8 -> both levels.

        Returns:
            Top latents (n, dim, height/8, width/8), and features of the bottom level (n, channels, height/4, width/4).
        """
        features = functional.relu(self.enc_b(images))  # an encoder ends in a ReLU, which has no key
        return self.quantize_conv_t(functional.relu(self.enc_t(features))), features

    def walk(self, encoded: tuple[Tensor, Tensor], quantize: Quantize) -> tuple[Tensor, Tensor]:
        """Top latents and features -> quantized latents of both levels."""
        latents, features = encoded
        top = quantize(0, latents)
        return top, quantize(1, self.quantize_conv_b(torch.cat([self.dec_t(top), features], 1)))

    def decode(self, quantized: tuple[Tensor, Tensor]) -> Tensor:
        """(n, dim, height/8, width/8), (n, dim, height/4, width/4) -> images (n, channels, height, width)."""
        top, bottom = quantized
        images: Tensor = self.dec(torch.cat([self.upsample_t(top), bottom], 1))
        return images


def _quantizer(shape: tuple[int, ...]) -> nn.Module:
    """The module of a codebook of (dim, size), as the tutorial initializes it."""
    module = nn.Module()
    module.embed = nn.Parameter(torch.randn(shape))
    return module
