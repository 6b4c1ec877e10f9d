"""The VQVAE of AntixK/PyTorch-VAE, built from the shapes: any number of halvings and of residual layers.

Stride, padding and activations, which shapes do not tell, are the published code's. A layer without tensors is a
LeakyReLU of slope 0.01, which follows each convolution, too; a tanh ends the decoder. Latents come out of a LeakyReLU.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from codebook_tools.checkpoints.tensors import Shapes
from codebook_tools.models.networks._conv import convolution, decoding, sequence


class ResidualLayer(nn.Module):
    """x + block(x), without in-place operations on x."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.resblock = nn.Sequential(
            convolution(shapes, f"{name}.resblock.0"), nn.ReLU(), convolution(shapes, f"{name}.resblock.2")
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) -> the same shape."""
        changed: Tensor = self.resblock(x)
        return x + changed


class PyTorchVQVAE(nn.Module):
    """The network for the shapes, by key, of a checkpoint in this layout; codebook: (size, dim)."""

    def __init__(self, shapes: Shapes, codebook: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder = _side(shapes, "encoder", convolution)
        self.vq_layer = nn.Module()
        size, dim = codebook
        self.vq_layer.embedding = nn.Embedding(size, dim)
        self.decoder = _side(shapes, "decoder", decoding)
        last = self.decoder[-1]
        assert isinstance(last, nn.Sequential)
        last[1] = nn.Tanh()

    def encode(self, images: Tensor) -> Tensor:
        """images (n, channels, height, width) in the model's range -> latents (n, dim, *grid)."""
        latents: Tensor = self.encoder(images)
        return latents

    def decode(self, quantized: Tensor) -> Tensor:
        """quantized (n, dim, *grid) -> images (n, channels, height, width) in [-1, 1]."""
        images: Tensor = self.decoder(quantized)
        return images


def _side(shapes: Shapes, name: str, layer: Callable[[Shapes, str], nn.Module]) -> nn.Sequential:
    kinds: dict[str, Callable[[str], nn.Module]] = {
        ".0.weight": lambda name: nn.Sequential(layer(shapes, f"{name}.0"), nn.LeakyReLU()),
        ".resblock.0.weight": lambda name: ResidualLayer(shapes, name),
    }
    return sequence(shapes, name, kinds, nn.LeakyReLU)
