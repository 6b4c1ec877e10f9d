"""Small VQ-VAEs in training loops as people write them, and quantizers as their tutorials publish them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

DIM, K = 6, 24


class Net(nn.Module):
    """Images (n, 3, side, side) -> their reconstruction, and what the quantizer returned."""

    def __init__(self, quantizer: nn.Module, dim: int = DIM) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, dim, 4, 4), nn.ConvTranspose2d(dim, 3, 4, 4)
        self.quantizer = quantizer

    def forward(self, images: Tensor) -> tuple[Tensor, Any]:
        returned = self.quantizer(latents := self.encoder(images))
        quantized = next(one for one in returned if isinstance(one, Tensor) and one.shape == latents.shape)
        return self.decoder(quantized), returned


class Straight(nn.Module):
    """nn.Embedding, with the losses of the paper: (quantized, loss, indices), as mishalaskin's and taming's."""

    def __init__(self, size: int = K, dim: int = DIM) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim)

    def forward(self, z: Tensor) -> Any:
        rows = z.permute(0, 2, 3, 1)
        indices = torch.cdist(rows.flatten(0, 2), self.embedding.weight).argmin(1)
        quantized = self.embedding(indices).view(rows.shape)
        loss = functional.mse_loss(quantized, rows.detach()) + 0.25 * functional.mse_loss(quantized.detach(), rows)
        quantized = rows + (quantized - rows).detach()
        return self.answer(quantized.permute(0, 3, 1, 2), loss, indices)

    def answer(self, quantized: Tensor, loss: Tensor, indices: Tensor) -> Any:
        return quantized, loss, indices


class WithoutCodes(Straight):
    """As PyTorch-VAE returns: (quantized, loss); and without a call of the embedding."""

    def forward(self, z: Tensor) -> Any:
        rows = z.permute(0, 2, 3, 1)
        indices = torch.cdist(rows.flatten(0, 2), self.embedding.weight).argmin(1)
        hits = functional.one_hot(indices, self.embedding.num_embeddings).float()
        quantized = (hits @ self.embedding.weight).view(rows.shape)
        loss = functional.mse_loss(quantized, rows.detach()) + 0.25 * functional.mse_loss(quantized.detach(), rows)
        quantized = rows + (quantized - rows).detach()
        return quantized.permute(0, 3, 1, 2), loss


class LookedUp(Straight):
    """Returns no codes, but calls its embedding with them."""

    def answer(self, quantized: Tensor, loss: Tensor, indices: Tensor) -> Any:
        return quantized, loss


class Averaged(nn.Module):
    """zalandoresearch/pytorch-vq-vae's VectorQuantizerEMA: (loss, quantized, perplexity, one-hot encodings)."""

    def __init__(self, size: int = K, dim: int = DIM, decay: float = 0.9) -> None:
        super().__init__()
        self._embedding = nn.Embedding(size, dim)
        self.register_buffer("_ema_cluster_size", torch.zeros(size))
        self._ema_w = nn.Parameter(self._embedding.weight.detach().clone())
        self._decay = decay

    def forward(self, inputs: Tensor) -> Any:
        inputs = inputs.permute(0, 2, 3, 1).contiguous()
        flat = inputs.view(-1, inputs.shape[-1])
        indices = torch.cdist(flat, self._embedding.weight).argmin(1, keepdim=True)
        encodings = torch.zeros(len(flat), self._embedding.num_embeddings).scatter_(1, indices, 1)
        quantized = torch.matmul(encodings, self._embedding.weight).view(inputs.shape)
        if self.training:
            counts: Any = self._ema_cluster_size
            self._ema_cluster_size = counts * self._decay + (1 - self._decay) * encodings.sum(0)
            n = self._ema_cluster_size.sum()
            smooth = (self._ema_cluster_size + 1e-5) / (n + len(encodings.T) * 1e-5) * n
            self._ema_w.data = self._ema_w * self._decay + (1 - self._decay) * encodings.T @ flat.detach()
            self._embedding.weight.data = self._ema_w / smooth[:, None]
        loss = 0.25 * functional.mse_loss(quantized.detach(), inputs)
        quantized = inputs + (quantized - inputs).detach()
        return loss, quantized.permute(0, 3, 1, 2).contiguous(), torch.tensor(1.0), encodings


class Columns(nn.Module):
    """rosinality/vq-vae-2-pytorch's Quantize, whose codes are columns and whose latents end in the channels."""

    def __init__(self, size: int = K, dim: int = DIM) -> None:
        super().__init__()
        self.register_buffer("embed", torch.randn(dim, size))
        self.register_buffer("cluster_size", torch.zeros(size))
        self.register_buffer("embed_avg", self.embed.clone())  # type: ignore[operator]

    def forward(self, inputs: Tensor) -> Any:
        embed: Any = self.embed
        latents = inputs.permute(0, 2, 3, 1)
        flat = latents.reshape(-1, len(embed))
        distance = flat.pow(2).sum(1, keepdim=True) - 2 * flat @ embed + embed.pow(2).sum(0, keepdim=True)
        _, indices = (-distance).max(1)
        hits = functional.one_hot(indices, embed.shape[1]).type(flat.dtype)
        quantized = functional.embedding(indices.view(latents.shape[:-1]), embed.T)
        if self.training:
            sizes: Any = self.cluster_size
            sums: Any = self.embed_avg
            sizes.data.mul_(0.9).add_(hits.sum(0), alpha=0.1)
            sums.data.mul_(0.9).add_(flat.detach().T @ hits, alpha=0.1)
            n = sizes.sum()
            smooth = (sizes + 1e-5) / (n + embed.shape[1] * 1e-5) * n
            embed.data.copy_(sums / smooth[None])
        loss = (quantized.detach() - latents).pow(2).mean()
        quantized = latents + (quantized - latents).detach()
        return quantized.permute(0, 3, 1, 2), loss, indices.view(latents.shape[:-1])


def vq(**settings: Any) -> nn.Module:
    """VectorQuantize of vector-quantize-pytorch."""
    from vector_quantize_pytorch import VectorQuantize

    return VectorQuantize(**({"dim": DIM, "codebook_size": K, "accept_image_fmap": True} | settings))


def diffusers() -> nn.Module:
    """The VectorQuantizer of diffusers."""
    from diffusers.models.autoencoders.vae import VectorQuantizer

    return VectorQuantizer(K, DIM, beta=0.25, legacy=False)


QUANTIZERS: dict[str, Callable[[], nn.Module]] = {
    "straight": Straight, "without codes": WithoutCodes, "looked up": LookedUp, "averaged": Averaged,
    "columns": Columns, "diffusers": diffusers, "vq": vq,
    "vq, learned": lambda: vq(learnable_codebook=True, ema_update=False),
    "vq, k-means": lambda: vq(kmeans_init=True), "vq, cosine": lambda: vq(use_cosine_sim=True),
}  # fmt: skip


def made(name: str, seed: int = 0) -> Net:
    """A network around a quantizer."""
    torch.manual_seed(seed)
    return Net(QUANTIZERS[name]())


def images(n: int, seed: int = 0) -> Tensor:
    """(n, 3, 16, 16): gratings of many directions."""
    generator = torch.Generator().manual_seed(seed)
    a, b, phase, level = torch.rand(4, n, 3, 1, 1, generator=generator)
    y, x = torch.meshgrid(*[torch.linspace(0, 1, 16)] * 2, indexing="ij")
    return level + 0.5 * torch.sin(8 * (a - 0.5) * x + 8 * (b - 0.5) * y + 6 * phase)


def train(net: Net, steps: int, optimizer: torch.optim.Optimizer | None = None, seed: int = 0) -> list[Tensor]:
    """Adam on the squared error and the quantizer's loss, with torch's own random numbers.

    Returns:
        The latents of each step.
    """
    torch.manual_seed(seed)
    optimizer = optimizer or torch.optim.Adam(net.parameters(), 3e-3)
    media, latents = images(256), list[Tensor]()
    handle = net.encoder.register_forward_hook(lambda module, args, output: latents.append(output.detach().clone()))
    net.train()
    for _ in range(steps):
        batch = media[torch.randint(len(media), (32,))]
        reconstruction, returned = net(batch)
        losses = [one.sum() for one in returned if isinstance(one, Tensor) and one.ndim < 2 and one.requires_grad]
        loss = (reconstruction - batch).square().mean() / media.var() + sum(losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    handle.remove()
    return latents
