"""VQGAN and MoVQ once more, independent of any library: what ours is held against."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from families import State, pictures
from torch import Tensor
from torch.nn import functional

from codebook_tools.models.families.diffusers_vqmodel import CODEBOOK


@dataclass
class Twin:
    """The network as its papers describe it, written out as functions of tensors by name, which are random and made
    when they are first asked for. widths: channels by level, the finest first. attended: levels with attention.
    channels: of its images, in and out. movq: whether the decoder's norms are modulated by the codes."""

    widths: tuple[int, ...] = (32, 64)
    depth: int = 1
    attended: tuple[int, ...] = ()
    middle: bool = True
    latent: int = 4
    dim: int = 4
    channels: tuple[int, int] = (3, 3)
    movq: bool = False
    state: State = field(default_factory=dict)
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __post_init__(self) -> None:
        self.tensor(CODEBOOK, (16, self.dim))
        self.decode(self.encode(pictures(self.channels[0])))

    def tensor(self, key: str, shape: tuple[int, ...], scale: float = 1.0, mean: float = 0.0) -> Tensor:
        if key not in self.state:
            self.state[key] = torch.randn(shape, generator=self.random) * scale + mean
        return self.state[key]

    def conv(self, key: str, x: Tensor, out: int, kernel: int = 3, stride: int = 1) -> Tensor:
        weight = self.tensor(f"{key}.weight", (out, x.shape[1], kernel, kernel), (x.shape[1] * kernel**2) ** -0.5)
        bias = self.tensor(f"{key}.bias", (out,), 0.1)
        return functional.conv2d(x, weight, bias, stride, padding=kernel // 2 if stride == 1 else 0)

    def group_norm(self, key: str, x: Tensor) -> Tensor:
        n, width, *grid = x.shape
        groups = x.reshape(n, 32, -1)
        spread = groups.var(-1, correction=0, keepdim=True)
        plain = ((groups - groups.mean(-1, keepdim=True)) / (spread + 1e-6).sqrt()).reshape(n, width, *grid)
        weight, bias = (
            self.tensor(f"{key}.{leaf}", (width,), 0.1, mean) for leaf, mean in (("weight", 1.0), ("bias", 0.0))
        )
        return plain * weight[:, None, None] + bias[:, None, None]

    def norm(self, key: str, x: Tensor, codes: Tensor | None) -> Tensor:
        if codes is None:
            return self.group_norm(key, x)
        spread = codes.repeat_interleave(x.shape[-1] // codes.shape[-1], -1).repeat_interleave(
            x.shape[-2] // codes.shape[-2], -2
        )
        scale, shift = (self.conv(f"{key}.{leaf}", spread, x.shape[1], 1) for leaf in ("conv_y", "conv_b"))
        return self.group_norm(f"{key}.norm_layer", x) * scale + shift

    def block(self, key: str, x: Tensor, out: int, codes: Tensor | None) -> Tensor:
        h = self.conv(f"{key}.conv1", swish(self.norm(f"{key}.norm1", x, codes)), out)
        h = self.conv(f"{key}.conv2", swish(self.norm(f"{key}.norm2", h, codes)), out)
        return (x if x.shape[1] == out else self.conv(f"{key}.nin_shortcut", x, out, 1)) + h

    def attention(self, key: str, x: Tensor, codes: Tensor | None) -> Tensor:
        width, normed = x.shape[1], self.norm(f"{key}.norm", x, codes)
        q, k, v = (self.conv(f"{key}.{name}", normed, width, 1).flatten(2) for name in "qkv")
        weights = torch.einsum("ncq,nck->nqk", q, k).div(width**0.5).softmax(-1)
        seen = torch.einsum("nqk,nck->ncq", weights, v).reshape(x.shape)
        return x + self.conv(f"{key}.proj_out", seen, width, 1)

    def level(self, key: str, x: Tensor, level: int, depth: int, codes: Tensor | None) -> Tensor:
        for i in range(depth):
            x = self.block(f"{key}.{level}.block.{i}", x, self.widths[level], codes)
            if level in self.attended:
                x = self.attention(f"{key}.{level}.attn.{i}", x, codes)
        return x

    def mid(self, key: str, x: Tensor, codes: Tensor | None) -> Tensor:
        x = self.block(f"{key}.block_1", x, x.shape[1], codes)
        x = self.attention(f"{key}.attn_1", x, codes) if self.middle else x
        return self.block(f"{key}.block_2", x, x.shape[1], codes)

    def encode(self, images: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", images, self.widths[0])
        for level in range(len(self.widths)):
            x = self.level("encoder.down", x, level, self.depth, None)
            if level < len(self.widths) - 1:  # one row and column of zeros, below and on the right
                padded = functional.pad(x, (0, 1, 0, 1))
                x = self.conv(f"encoder.down.{level}.downsample.conv", padded, x.shape[1], stride=2)
        x = self.norm("encoder.norm_out", self.mid("encoder.mid", x, None), None)
        return self.conv("quant_conv", self.conv("encoder.conv_out", swish(x), self.latent), self.dim, 1)

    def decode(self, codes: Tensor) -> Tensor:
        by = codes if self.movq else None
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", codes, self.latent, 1), self.widths[-1])
        x = self.mid("decoder.mid", x, by)
        for level in reversed(range(len(self.widths))):
            x = self.level("decoder.up", x, level, self.depth + 1, by)
            if level > 0:
                larger = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
                x = self.conv(f"decoder.up.{level}.upsample.conv", larger, x.shape[1])
        return self.conv("decoder.conv_out", swish(self.norm("decoder.norm_out", x, by)), self.channels[1])


def swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()
