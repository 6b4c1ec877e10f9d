"""The network of the zalando tutorial (zalandoresearch/pytorch-vq-vae) and its many copies, built from the shapes."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from codebook_tools.checkpoints.tensors import Shapes
from codebook_tools.models.networks._conv import convolution


class Residual(nn.Module):
    """relu(x) + block(relu(x)): the tutorial's blocks begin with an in-place ReLU, so the skip path carries relu(x)."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self._block = nn.Sequential(
            nn.Identity(), convolution(shapes, f"{name}._block.1"), nn.ReLU(), convolution(shapes, f"{name}._block.3")
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) -> the same shape."""
        x = functional.relu(x)
        changed: Tensor = self._block(x)
        return x + changed


class ResidualStack(nn.Module):
    """As many residual blocks as there are in the shapes, and a ReLU."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        depth = len({key.split(".")[len(name.split(".")) + 1] for key in shapes if key.startswith(f"{name}._layers.")})
        self._layers = nn.ModuleList(Residual(shapes, f"{name}._layers.{i}") for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) -> the same shape."""
        for layer in self._layers:
            x = layer(x)
        return functional.relu(x)


class Encoder(nn.Module):
    """Two halving convolutions and a residual stack."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self._conv_1 = convolution(shapes, "_encoder._conv_1")
        self._conv_2 = convolution(shapes, "_encoder._conv_2")
        self._conv_3 = convolution(shapes, "_encoder._conv_3")
        self._residual_stack = ResidualStack(shapes, "_encoder._residual_stack")

    def forward(self, x: Tensor) -> Tensor:
        """images (n, channels, height, width) -> features (n, hidden, height/4, width/4)."""
        x = functional.relu(self._conv_1(x))
        x = functional.relu(self._conv_2(x))
        out: Tensor = self._residual_stack(self._conv_3(x))
        return out


class Decoder(nn.Module):
    """A residual stack and two doubling convolutions."""

    def __init__(self, shapes: Shapes, transposed: bool) -> None:
        super().__init__()
        self._conv_1 = convolution(shapes, "_decoder._conv_1", transposed)
        self._residual_stack = ResidualStack(shapes, "_decoder._residual_stack")
        self._conv_trans_1 = convolution(shapes, "_decoder._conv_trans_1", transposed=True)
        self._conv_trans_2 = convolution(shapes, "_decoder._conv_trans_2", transposed=True)

    def forward(self, x: Tensor) -> Tensor:
        """(n, dim, height/4, width/4) -> images (n, channels, height, width)."""
        x = self._residual_stack(self._conv_1(x))
        x = functional.relu(self._conv_trans_1(x))
        out: Tensor = self._conv_trans_2(x)
        return out


class ZalandoVQVAE(nn.Module):
    """The network for the shapes of a checkpoint in this layout.

    Args:
        shapes: By key; they tell channels, depth, biases and weight normalization.
        codebook: (size, dim).
        transposed: Whether the decoder's first convolution is transposed, too.
    """

    def __init__(self, shapes: Shapes, codebook: tuple[int, ...], transposed: bool = False) -> None:
        super().__init__()
        self._encoder = Encoder(shapes)
        self._pre_vq_conv = convolution(shapes, "_pre_vq_conv")
        self._vq_vae = nn.Module()
        size, dim = codebook
        self._vq_vae._embedding = nn.Embedding(size, dim)
        self._decoder = Decoder(shapes, transposed)

    def encode(self, images: Tensor) -> Tensor:
        """images (n, channels, height, width) in the model's range -> latents (n, dim, height/4, width/4)."""
        latents: Tensor = self._pre_vq_conv(self._encoder(images))
        return latents

    def decode(self, quantized: Tensor) -> Tensor:
        """quantized (n, dim, height/4, width/4) -> images (n, channels, height, width)."""
        images: Tensor = self._decoder(quantized)
        return images


def make(
    codebook_size: int = 512, channels: int = 3, hidden: int = 128, residual: int = 32, depth: int = 2, dim: int = 64
) -> ZalandoVQVAE:
    """A fresh network with the tutorial's own initialization, its codebook drawn from U(-1/K, 1/K).

    Args:
        codebook_size: K.
        channels: Of the images.
        hidden: Channels of the residual blocks.
        residual: Channels inside of them.
        depth: Residual blocks in encoder and decoder.
        dim: Of latents and codes.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "_encoder._conv_1": (hidden // 2, channels, 4, 4),
        "_encoder._conv_2": (hidden, hidden // 2, 4, 4),
        "_encoder._conv_3": (hidden, hidden, 3, 3),
        "_pre_vq_conv": (dim, hidden, 1, 1),
        "_decoder._conv_1": (hidden, dim, 3, 3),
        "_decoder._conv_trans_1": (hidden, hidden // 2, 4, 4),
        "_decoder._conv_trans_2": (hidden // 2, channels, 4, 4),
    }
    biases = {f"{name}.bias": (shape[1 if "trans" in name else 0],) for name, shape in shapes.items()}
    for side in ("_encoder", "_decoder"):
        for i in range(depth):
            shapes[f"{side}._residual_stack._layers.{i}._block.1"] = (residual, hidden, 3, 3)
            shapes[f"{side}._residual_stack._layers.{i}._block.3"] = (hidden, residual, 1, 1)
    weights = {f"{name}.weight": shape for name, shape in shapes.items()}
    network = ZalandoVQVAE({**weights, **biases}, (codebook_size, dim))
    embedding = network._vq_vae._embedding
    assert isinstance(embedding, nn.Embedding)
    nn.init.uniform_(embedding.weight, -1 / codebook_size, 1 / codebook_size)
    return network
