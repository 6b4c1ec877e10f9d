"""Small models of six kinds that are trained here, healthy or into a collapse, and the mistakes that people make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import soundfile
import torch
from proven_networks import Coders, Tied, write_own
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional
from vector_quantize_pytorch import VectorQuantize

DIM, SIDE, CLIP, RATE = 8, 16, 256, 1600
State = dict[str, Tensor]


class Images(Coders):
    """Patches of 4 by 4 grey pixels in [0, 1] to DIM latents, and back."""

    layers: tuple[Any, Any, int] = (nn.Conv2d, nn.ConvTranspose2d, 4)

    def __init__(self) -> None:
        conv, up, side = self.layers
        encoder = nn.Sequential(conv(1, 24, side, side), nn.GELU(), conv(24, DIM, 1))
        super().__init__(encoder, nn.Sequential(conv(DIM, 24, 1), nn.GELU(), up(24, 1, side, side)))


def nearest(latents: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """By brute force: latents (n, dim, *grid) -> their codes' vectors, alike, and codes (n, *grid)."""
    rows = latents.movedim(1, -1)
    chosen = torch.cdist(rows.flatten(0, -2), codes).argmin(1).reshape(rows.shape[:-1])
    return codes[chosen].movedim(-1, 1), chosen


def pull(latents: Tensor, quantized: Tensor) -> Tensor:
    """The loss that moves codes to latents, and latents to codes."""
    return (quantized - latents.detach()).square().mean() + 0.25 * (latents - quantized.detach()).square().mean()


class Plain(Images):
    """Codes that gradients move."""

    keys: tuple[str, ...] = ("vq.codebook.weight",)

    def __init__(self, size: int) -> None:
        super().__init__()
        self.vq = nn.Module()
        self.vq.codebook = nn.Embedding(size, DIM)

    def quantise(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """latents -> the codes with a straight-through gradient, and the loss that moves them."""
        quantized, _ = nearest(latents, self.vq.codebook.weight)  # type: ignore[arg-type]
        return latents + (quantized - latents).detach(), pull(latents, quantized)


class PlainSounds(Plain):
    """Eight samples of a waveform to DIM latents, and back."""

    layers = (nn.Conv1d, nn.ConvTranspose1d, 8)
    sampling_rate, hop, channels = RATE, 8, 1


class Two(Images):
    """Two residual stages."""

    codebooks = keys = Tied.codebooks
    walk = Tied.walk

    def __init__(self, size: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Embedding(size, DIM) for _ in range(2)])

    def quantise(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        rest, loss, total = latents, latents.new_zeros(()), torch.zeros_like(latents)
        for stage in self.stages:
            quantized, _ = nearest(rest, stage.weight)  # type: ignore[arg-type]
            loss = loss + pull(rest, quantized)
            rest, total = rest - quantized.detach(), total + quantized
        return latents + (total - latents).detach(), loss


class Library(Images):
    """Around a quantizer of vector-quantize-pytorch, which averages."""

    keys: tuple[str, ...] = ("vq._codebook.embed",)
    more: ClassVar[dict[str, Any]] = {}

    def __init__(self, size: int) -> None:
        super().__init__()
        self.vq = VectorQuantize(dim=DIM, codebook_size=size, decay=0.9, accept_image_fmap=True, **self.more)

    def quantise(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        quantized, _, loss = self.vq(latents)
        return quantized, loss.sum()


class Cosine(Library):
    more: ClassVar[dict[str, Any]] = {"use_cosine_sim": True}


KINDS: dict[str, Callable[[int], Any]] = {
    "plain": Plain, "sounds": PlainSounds, "two stages": Two, "library": Library, "cosine": Cosine
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """media: (n, 1, ...), as the network takes them. path: of the same, for --data."""

    media: Tensor
    path: Path


def images_in(folder: Path, seed: int = 0, kinds: int = 0) -> Data:
    """400 grey images of gratings with a little noise, of as many kinds, or all different."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    drawn = random.uniform([0, -6, -6, 0.1, 0.2], [7, 6, 6, 0.5, 0.8], (kinds or 400, 5))
    phase, a, b, depth, level = (drawn[np.arange(400) % len(drawn)] if kinds else drawn).T[:, :, None, None]
    waves = level + depth * np.sin(phase + a * x + b * y) * (0.3 + 0.7 * x) + random.normal(0, 0.02, (400, SIDE, SIDE))
    pixels = (waves.clip(0, 1) * 255).astype(np.uint8)
    np.save(folder / "images.npy", pixels)
    return Data(torch.from_numpy(pixels)[:, None].float() / 255, folder / "images.npy")


def sounds_in(folder: Path, seed: int = 0) -> Data:
    """200 clips of a tone that glides, with a little noise."""
    random = np.random.default_rng(seed)
    t = np.arange(CLIP) / RATE
    (place := folder / "sounds").mkdir()
    clips = []
    for i in range(200):
        f, glide, loud = random.uniform([20, -400, 0.2], [300, 400, 0.9])
        clips.append(loud * np.sin(2 * np.pi * (f + glide * t) * t) + random.normal(0, 0.02, CLIP))
        soundfile.write(place / f"{i:03d}.wav", clips[-1].clip(-1, 1), RATE, subtype="FLOAT")
    return Data(torch.from_numpy(np.stack(clips)).float()[:, None].clip(-1, 1), place)


def train(
    network: Any, media: Tensor, steps: int, lr: float = 3e-3, *, quantized: bool = True, only: str = "", seed: int = 0
) -> None:
    """Adam on the squared error and the quantizer's own loss. only: the prefix of what learns."""
    torch.set_num_threads(1)  # high rates are chaotic: with more threads other digits, and another network
    learns = [tensor for name, tensor in network.named_parameters() if name.startswith(only)]
    optimizer, draws = torch.optim.Adam(learns, lr), torch.Generator().manual_seed(seed)
    network.train()
    for _ in range(steps):
        batch = media[torch.randint(len(media), (32,), generator=draws)]
        latents = network.encode(batch)
        through, loss = network.quantise(latents) if quantized else (latents, 0.0)
        error = (network.decode(through) - batch).square().mean() / media.var() + loss
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    network.eval()


@torch.no_grad()
def rows_of(network: Any, media: Tensor, stage: int = 0) -> Tensor:
    """(n, DIM) latents that meet a stage."""
    latents = network.encode(media)
    for before in range(stage):
        latents = latents - nearest(latents, dict(network.named_parameters())[network.keys[before]])[0]
    return latents.movedim(1, -1).flatten(0, -2)


def install(network: Any, stage: int, codes: Tensor, *, sums: bool = True) -> None:
    """Put codes (size, DIM) where the network has them. sums: with its running state."""
    tensor = network.state_dict()[network.keys[stage]]
    tensor.copy_(codes.reshape(tensor.shape))
    if isinstance(network, Library) and sums:
        inner = network.vq._codebook
        inner.initted.fill_(1)
        inner.cluster_size.fill_(20.0)
        inner.embed_avg.copy_(inner.embed * 20.0)


def centroids(rows: Tensor, size: int, seed: int = 0) -> Tensor:
    """By scikit-learn."""
    return torch.from_numpy(KMeans(size, n_init=1, random_state=seed).fit(rows.numpy()).cluster_centers_).float()


def healthy(kind: str, media: Tensor, size: int = 32, seed: int = 0) -> Any:
    """Trained without quantization first, then with codes that k-means placed."""
    torch.manual_seed(seed)
    network = KINDS[kind](size)
    train(network, media, 150, quantized=False, seed=seed)
    for stage in range(len(network.keys)):
        rows = rows_of(network, media, stage)
        if kind == "cosine":
            rows = functional.normalize(rows, dim=1)
        install(network, stage, centroids(rows, size, seed))
    train(network, media, 80, 3e-4, seed=seed + 1)
    return network


def collapsed(kind: str, media: Tensor, size: int = 128, seed: int = 0, scale: float = 1.0) -> Any:
    """Trained from the start with codes that many times as far out as torch draws them."""
    torch.manual_seed(seed)
    network = KINDS[kind](size)
    for stage in range(len(network.keys)):
        codes = torch.randn(size, DIM) * scale
        install(network, stage, functional.normalize(codes, dim=1) if kind == "cosine" else codes)
    train(network, media, 250, 2e-3, seed=seed)
    return network


def write(network: Any, kind: str, folder: Path, name: str = "model") -> tuple[Path, str]:
    """Its checkpoint, and what --network takes."""
    return write_own(network, f"from collapsing import KINDS as MADE; NAME = {kind!r}", folder, name)
