"""The network of a DacModel: each stage looks its codes up in few dimensions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from codebook_tools.models.network import Quantize, Search
from codebook_tools.models.networks.residual import Encoded, fitted, residual


class Dac(nn.Module):
    """A DacModel. All of its stages are walked; the library's `n_quantizers` takes only the first ones."""

    channels = 1

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.codebooks = tuple(f"quantizer.quantizers.{i}.codebook.weight" for i in range(model.config.n_codebooks))
        self.sampling_rate = int(model.config.sampling_rate)
        self.hop = int(model.config.hop_length)
        self.latent_dim = int(model.config.hidden_size)

    def encode(self, waveforms: Tensor) -> Encoded:
        """waveforms (n, 1, samples) in [-1, 1] -> latents before the projections of the stages."""
        return Encoded(self.model.encoder(waveforms), waveforms.shape[-1])

    def from_latents(self, latents: Tensor) -> Encoded:
        """latents (n, dim, positions) as `encode` makes them -> what it returns for them."""
        return Encoded(latents, 0)

    def walk(self, encoded: Encoded, quantize: Quantize, search: Search = residual) -> Encoded:
        """A stage quantizes between its projections; residuals are taken outside of them."""
        layers = self.model.quantizer.quantizers

        def projected(stage: int, left: Tensor) -> Tensor:
            quantized: Tensor = layers[stage].out_proj(quantize(stage, layers[stage].in_proj(left)))
            return quantized

        return encoded._replace(latents=search(encoded.latents, range(len(layers)), projected))

    def quantize(self, encoded: Encoded) -> tuple[Encoded, Tensor]:
        """The library's own quantizer, with all of its stages; codes (n, levels, positions)."""
        quantized, codes, *_ = self.model.quantizer(encoded.latents)
        return encoded._replace(latents=quantized), codes

    def decode(self, quantized: Encoded) -> Tensor:
        """quantized latents -> waveforms (n, 1, samples).

        With an odd ratio, as at 24 kHz, the library's decoder makes some samples too few (8 there): the last are zeros.
        """
        return fitted(self.model.decoder(quantized.latents), quantized.samples)
