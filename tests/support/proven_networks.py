"""Small networks that use their codebooks in ways that a file does not tell, with data on which most codes are dead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from points import looked_up as nearest
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from vector_quantize_pytorch import GroupedResidualVQ, ResidualVQ, SimVQ, VectorQuantize

DIM = 6


class Coders(nn.Module):
    """Patches of 4 by 4 grey pixels to DIM latents, and back."""

    def __init__(self, encoder: nn.Module | None = None, decoder: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = encoder or nn.Conv2d(1, DIM, 4, 4)
        self.decoder = decoder or nn.ConvTranspose2d(DIM, 1, 4, 4)

    def encode(self, media: Tensor) -> Tensor:
        return self.encoder(media)  # type: ignore[no-any-return]

    def decode(self, quantized: Tensor) -> Tensor:
        return self.decoder(quantized)  # type: ignore[no-any-return]


class Tied(Coders):
    """Two residual stages that share one embedding."""

    codebooks = ("stages.0.weight", "stages.1.weight")

    def __init__(self, size: int) -> None:
        super().__init__()
        shared = nn.Embedding(size, DIM)
        self.stages = nn.ModuleList([shared, shared])

    def walk(self, latents: Tensor, quantise: Callable[[int, Tensor], Tensor]) -> Tensor:
        first = quantise(0, latents)
        return first + quantise(1, latents - first)


class Round(Coders):
    """Codes of unit length, and nothing that says how they are searched."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.vq = nn.Module()
        self.vq.codebook = nn.Embedding(size, DIM)


class Projected(Round):
    """Codes are its rows times a matrix, as in SimVQ, under a name that nobody knows, and shifted."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.vq.blend = nn.Parameter(torch.randn(DIM, DIM))
        self.vq.lift = nn.Parameter(torch.randn(DIM))

    def codes(self) -> Tensor:
        codes: Tensor = self.vq.codebook.weight @ self.vq.blend + self.vq.lift
        return codes

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        return nearest(latents, self.codes())


class Warped(Projected):
    """Codes are a function of its rows that no formula of ours is."""

    def codes(self) -> Tensor:
        return torch.tanh(super().codes())


class Averaged(Round):
    """Codes that an average moves, in tensors of any names. Its sums lie across its codes."""

    counts, sums = "mass", "moment"

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.vq.register_buffer(self.counts, torch.zeros(size))
        self.vq.register_buffer(self.sums, torch.zeros(DIM, size))

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.vq.codebook.weight
        quantized, chosen = nearest(latents, codes)
        if self.training:
            rows = latents.movedim(1, -1).flatten(0, -2)
            hits = functional.one_hot(chosen.flatten(), len(codes)).float()
            counts, sums = getattr(self.vq, self.counts), getattr(self.vq, self.sums)
            counts.mul_(0.99).add_(hits.sum(0), alpha=0.01)
            sums.mul_(0.99).add_((hits.T @ rows).T, alpha=0.01)
            with torch.no_grad():
                codes.copy_((sums / counts.clamp(min=1e-5)).T)
        return quantized, chosen


class Swapped(Averaged):
    """As `Averaged`, but its search does not look at the codes as they are: it takes the farthest."""

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.vq.codebook.weight
        rows = latents.movedim(1, -1)
        chosen = (rows[..., None, :] - codes).square().sum(-1).argmax(-1)
        return codes[chosen].movedim(-1, 1), chosen


class Headed(Round):
    """With a head over its codes."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.head = nn.Linear(DIM, size)


class Fixed(Round):
    """As many codes as its author wrote into it, whatever it is asked for."""

    def __init__(self, size: int) -> None:
        super().__init__(24)


class Library(Coders):
    """Around a quantizer of vector-quantize-pytorch."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.vq = quantizer


def _library(make: Callable[..., nn.Module], **more: Any) -> Callable[[int], nn.Module]:
    return lambda size: Library(make(dim=DIM, codebook_size=size, **more))


LIBRARIES: dict[str, Callable[[int], nn.Module]] = {
    "plain": _library(VectorQuantize),
    "cosine": _library(VectorQuantize, use_cosine_sim=True),
    "projected": _library(VectorQuantize, codebook_dim=4),
    "images": _library(VectorQuantize, accept_image_fmap=True),
    "heads": _library(VectorQuantize, heads=2, codebook_dim=3),
    "residual": _library(ResidualVQ, num_quantizers=2),
    "shared": _library(ResidualVQ, num_quantizers=3, shared_codebook=True),
    "grouped": _library(GroupedResidualVQ, groups=2, num_quantizers=2),
    "sim": _library(SimVQ),
}
OWN = (Tied, Projected, Warped, Averaged, Swapped, Round, Headed, Fixed)
NETWORKS: dict[str, Callable[[int], nn.Module]] = {network.__name__.lower(): network for network in OWN}
NETWORKS |= {f"library {name}": make for name, make in LIBRARIES.items()}


def made(name: str, size: int) -> nn.Module:
    """A network whose first codes lie among the latents, and whose others are far away."""
    torch.manual_seed(sum(map(ord, name)))
    network = NETWORKS[name](size).eval().requires_grad_(False)
    for key, tensor in network.state_dict().items():
        book = tensor.ndim > 1 and size in tensor.shape and "ensemble" not in key
        if book and key.endswith(("embed", "frozen_codebook", "codebook.weight", "0.weight")) and "coder" not in key:
            drawn = torch.randn(tensor.shape) * 0.7
            unit = "cosine" in name or name == "round"
            tensor.copy_(functional.normalize(drawn, dim=-1) if unit else drawn)
            if not unit:
                tensor.reshape(-1, tensor.shape[-1])[size // 2 :] *= 40
    state = network.state_dict()
    if (counts := state.get("vq.mass")) is not None:
        counts.copy_(torch.rand(size) * 50 + 2)
        state["vq.moment"].copy_((state["vq.codebook.weight"] * counts[:, None]).T)
    return network


def write_network(folder: Path, name: str, size: int) -> tuple[Path, str]:
    """Its checkpoint, and what --network takes."""
    return write_own(made(name, size), f"from proven_networks import NETWORKS as MADE; NAME = {name!r}", folder)


def write_own(network: nn.Module, names: str, folder: Path, name: str = "model") -> tuple[Path, str]:
    """As `write_network`. names: a line that defines MADE and NAME, which make one of any size."""
    state = {key: tensor.detach().clone().contiguous() for key, tensor in network.state_dict().items()}
    save_file(state, folder / f"{name}.safetensors")
    (folder / "network.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{names}\n\n\n"
        f"def make(codebook_size):\n    return MADE[NAME](codebook_size)\n"
    )
    return folder / f"{name}.safetensors", f"{folder / 'network.py'}:make"


def write_images(folder: Path) -> tuple[Path, Path]:
    """80 grey images of 16 by 16 to calibrate on, and 30 others."""
    drawn = np.random.default_rng(0).integers(0, 256, (110, 16, 16), dtype=np.uint8)
    paths = folder / "calibration.npy", folder / "held_out.npy"
    for path, images in zip(paths, (drawn[:80], drawn[80:]), strict=True):
        np.save(path, images)
    return paths
