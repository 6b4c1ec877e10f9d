"""The network of an EncodecModel: residual stages on the latents of overlapping chunks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from codebook_tools.models.network import Quantize, Search
from codebook_tools.models.networks.residual import fitted, residual

_LOUDNESS = (
    "tokens do not hold loudness, which this model divides each chunk of sound by: decoded sound has a loudness of 1"
)


class Chunks(NamedTuple):
    """Latents of overlapping chunks of waveforms.

    Attributes:
        latents: (n, dim, positions) of all chunks, concatenated.
        lengths: Positions of each chunk.
        loudness: (n, 1, 1) of each chunk, by which its waveforms were divided.
        samples: Length of the waveforms.
    """

    latents: Tensor
    lengths: tuple[int, ...]
    loudness: tuple[Tensor, ...]
    samples: int


class Encodec(nn.Module):
    """An EncodecModel. All of its stages are walked; the library uses fewer at a lower bandwidth, its default."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.codebooks = tuple(f"quantizer.layers.{i}.codebook.embed" for i in range(model.config.num_quantizers))
        self.sampling_rate = int(model.config.sampling_rate)
        self.hop = math.prod(model.config.upsampling_ratios)
        self.channels = int(model.config.audio_channels)
        self.latent_dim = int(model.config.hidden_size)
        self.not_in_tokens = _LOUDNESS if model.config.normalize else None

    def encode(self, waveforms: Tensor) -> Chunks:
        """waveforms (n, channels, samples) in [-1, 1] -> latents of the library's chunks.

        There is one chunk where the config has no chunk length.
        """
        length, samples = self.model.config.chunk_length, waveforms.shape[-1]
        starts = self._starts(samples)
        chunks = [waveforms[..., start : start + length if length else None] for start in starts]
        loudness = tuple(self._loudness(chunk) for chunk in chunks)
        latents = [self.model.encoder(chunk / level) for chunk, level in zip(chunks, loudness, strict=True)]
        return Chunks(torch.cat(latents, -1), tuple(part.shape[-1] for part in latents), loudness, samples)

    def from_latents(self, latents: Tensor) -> Chunks:
        """latents (n, dim, positions) as `encode` makes them -> what it returns for them, as one chunk."""
        return Chunks(latents, (latents.shape[-1],), (latents.new_ones(len(latents), 1, 1),), 0)

    def walk(self, encoded: Chunks, quantize: Quantize, search: Search = residual) -> Chunks:
        """Residual stages on the latents of all chunks."""
        return encoded._replace(latents=search(encoded.latents, range(len(self.codebooks)), quantize))

    def quantize(self, encoded: Chunks) -> tuple[Chunks, Tensor]:
        """The library's own quantizer, with all of its stages; codes (n, levels, positions)."""
        codes = self.model.quantizer.encode(encoded.latents)
        return encoded._replace(latents=self.model.quantizer.decode(codes)), codes.transpose(0, 1)

    def decode(self, quantized: Chunks) -> Tensor:
        """quantized latents -> waveforms (n, channels, samples), with cross-faded chunks."""
        parts = quantized.latents.split_with_sizes(quantized.lengths, -1)
        chunks = [self.model.decoder(part) * level for part, level in zip(parts, quantized.loudness, strict=True)]
        if len(chunks) == 1:
            return fitted(chunks[0], quantized.samples)
        # Where the last chunk is short, the one before it exceeds it by up to a hop: the library fails there.
        starts = self._starts(quantized.samples)
        within = [chunk[..., : quantized.samples - start] for chunk, start in zip(chunks, starts, strict=True)]
        whole: Tensor = self.model._linear_overlap_add(within, starts.step)
        return fitted(whole, quantized.samples)

    def _starts(self, samples: int) -> range:
        config = self.model.config
        return range(0, samples, config.chunk_stride if config.chunk_length else samples)

    def _loudness(self, chunk: Tensor) -> Tensor:
        if not self.model.config.normalize:
            return chunk.new_ones(len(chunk), 1, 1)
        return chunk.mean(1, keepdim=True).pow(2).mean(-1, keepdim=True).sqrt() + 1e-8
