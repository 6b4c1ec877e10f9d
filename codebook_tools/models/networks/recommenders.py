"""RQ-VAEs of item embeddings, built from the shapes: perceptrons around residual codebooks.

Activations, which shapes do not tell, are the published code's: after each layer but the last. Dropout, of which a file
has only gaps in the numbers of the layers, is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional

from codebook_tools.checkpoints.tensors import Shapes
from codebook_tools.models.network import Quantize
from codebook_tools.models.networks.residual import residual

if TYPE_CHECKING:
    from codebook_tools.models.families.recommenders import Layout


class RQVAE(nn.Module):
    """The network for the shapes, by key, of a checkpoint in a layout of models/families/recommenders.py.

    Attributes:
        modality: Name of the modality: item embeddings are vectors.
        codebooks: As of a Walking network.
    """

    modality = "arrays"

    def __init__(self, shapes: Shapes, layout: Layout, of_2025: bool = False) -> None:
        """of_2025: whether it has SiLUs in place of ReLUs, and reconstructs rows of unit length."""
        super().__init__()
        self.codebooks, self._unit, self._side = layout.codebooks(shapes), of_2025, layout.side
        activation = nn.SiLU if of_2025 else nn.ReLU
        for name in ("encoder", "decoder"):
            side = nn.Module()
            side.add_module(layout.side, _perceptron(shapes, layout, name, activation))
            self.add_module(name, side)
        for key in self.codebooks:
            module: nn.Module = self
            *path, last, _ = key.split(".")
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            size, dim = shapes[key]
            module.add_module(last, nn.Embedding(size, dim))

    def encode(self, rows: Tensor) -> Tensor:
        """rows (n, in_dim) -> latents (n, dim)."""
        latents: Tensor = self.get_submodule(f"encoder.{self._side}")(rows)
        return latents

    def walk(self, latents: Tensor, quantize: Quantize) -> Tensor:
        """The sum of the codes of all levels, each of what those before it leave."""
        return residual(latents, range(len(self.codebooks)), quantize)

    def decode(self, quantized: Tensor) -> Tensor:
        """quantized (n, dim) -> rows (n, in_dim)."""
        rows: Tensor = self.get_submodule(f"decoder.{self._side}")(quantized)
        return functional.normalize(rows, dim=-1) if self._unit else rows


def _perceptron(shapes: Shapes, layout: Layout, side: str, activation: type[nn.Module]) -> nn.Sequential:
    """Layers in the places that their keys say: linear, its batch norm if it has one, activation, and gaps."""
    start, places = f"{side}.{layout.side}", layout.linear(shapes, side)
    layers = list[nn.Module]()
    for place in places:
        layers += [nn.Identity()] * (place - len(layers))
        outputs, inputs = shapes[f"{start}.{place}.weight"]
        layers.append(nn.Linear(inputs, outputs, bias=layout.biased))
        if f"{start}.{place + 1}.running_mean" in shapes:
            layers.append(nn.BatchNorm1d(outputs))
        if place != places[-1]:
            layers.append(activation())
    return nn.Sequential(*layers)
