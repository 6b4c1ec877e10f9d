"""The network of an XcodecModel: an acoustic and a semantic encoder share residual stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from codebook_tools.models.network import Quantize, Search
from codebook_tools.models.networks.residual import Encoded, fitted, residual


class Xcodec(nn.Module):
    """An XcodecModel with its semantic model (HuBERT or WavLM).

    All of its stages are walked, as at the highest bandwidth, the library's default. No gradient reaches the semantic
    model, which the library freezes, nor `fc1` and `decoder_semantic`, which only serve a loss in training.
    """

    channels = 1

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.codebooks = tuple(f"quantizer.quantizers.{i}.codebook.embed" for i in range(model.config.num_quantizers))
        self.sampling_rate = int(model.config.sample_rate)
        self.hop = int(model.config.hop_length)
        self.latent_dim = int(model.config.hidden_size)

    def encode(self, waveforms: Tensor) -> Encoded:
        """waveforms (n, 1, samples) in [-1, 1] -> acoustic and semantic latents, mixed by a linear layer."""
        semantic = self.model._extract_semantic_features(waveforms).transpose(1, 2)
        semantic = self.model.encoder_semantic(semantic)
        acoustic = self.model.acoustic_encoder(waveforms)
        if acoustic.shape[-1] != semantic.shape[-1]:  # then the library pads as it did for the semantic model
            acoustic = self.model.acoustic_encoder(functional.pad(waveforms, (self.hop // 2, self.hop // 2)))
        latents = _linear(self.model.fc, torch.cat([acoustic, semantic], 1))
        return Encoded(latents, waveforms.shape[-1])

    def from_latents(self, latents: Tensor) -> Encoded:
        """latents (n, dim, positions) as `encode` makes them -> what it returns for them."""
        return Encoded(latents, 0)

    def walk(self, encoded: Encoded, quantize: Quantize, search: Search = residual) -> Encoded:
        """Residual stages on the mixed latents."""
        return encoded._replace(latents=search(encoded.latents, range(len(self.codebooks)), quantize))

    def quantize(self, encoded: Encoded) -> tuple[Encoded, Tensor]:
        """The library's own quantizer, with all of its stages; codes (n, levels, positions)."""
        codes = self.model.quantizer.encode(encoded.latents)
        return encoded._replace(latents=self.model.quantizer.decode(codes)), codes.transpose(0, 1)

    def decode(self, quantized: Encoded) -> Tensor:
        """quantized latents -> waveforms (n, 1, samples)."""
        return fitted(self.model.acoustic_decoder(_linear(self.model.fc2, quantized.latents)), quantized.samples)


def _linear(layer: nn.Module, latents: Tensor) -> Tensor:
    mapped: Tensor = layer(latents.transpose(1, 2))
    return mapped.transpose(1, 2)
