"""The network of a MimiModel: semantic and acoustic stages side by side, each kind on its own projection."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from codebook_tools.models.network import Quantize, Search
from codebook_tools.models.networks.residual import Encoded, fitted, residual

_SEMANTIC, _ACOUSTIC = "semantic_residual_vector_quantizer", "acoustic_residual_vector_quantizer"


class Mimi(nn.Module):
    """A MimiModel. All of its stages are walked; the library's `num_quantizers` takes only the first ones.

    The file has sums of latents, embed_sum (K, dim), and counts, cluster_usage (K,); codes are their quotients.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        layers = [(name, i) for name in (_SEMANTIC, _ACOUSTIC) for i in range(len(self._stack(name).layers))]
        self.codebooks = tuple(f"quantizer.{name}.layers.{i}.codebook.embed_sum" for name, i in layers)
        self.sampling_rate = int(model.config.sampling_rate)
        self.hop = math.prod(model.config.upsampling_ratios) * int(self._half("encoder").downsample.conv.stride[0])
        self.channels = int(model.config.audio_channels)
        self.latent_dim = int(model.config.hidden_size)

    def encode(self, waveforms: Tensor) -> Encoded:
        """waveforms (n, channels, samples) in [-1, 1] -> latents before any projection."""
        half = self._half("encoder")
        hidden = getattr(half, "encoder_seanet", self.model.encoder)(waveforms).transpose(1, 2)
        hidden = half.encoder_transformer(hidden, use_cache=False)[0].transpose(1, 2)
        return Encoded(half.downsample(hidden), waveforms.shape[-1])

    def from_latents(self, latents: Tensor) -> Encoded:
        """latents (n, dim, positions) as `encode` makes them -> what it returns for them."""
        return Encoded(latents, 0)

    def walk(self, encoded: Encoded, quantize: Quantize, search: Search = residual) -> Encoded:
        """Semantic stages, then acoustic ones, each kind on its own projection of the same latents."""
        total, first = encoded.latents.new_zeros(()), 0
        for stack in (self._stack(_SEMANTIC), self._stack(_ACOUSTIC)):
            stages = range(first, first := first + len(stack.layers))
            into, out_of = stack.input_proj or nn.Identity(), stack.output_proj or nn.Identity()
            total = total + out_of(search(into(encoded.latents), stages, quantize))
        return encoded._replace(latents=total)

    def quantize(self, encoded: Encoded) -> tuple[Encoded, Tensor]:
        """The library's own quantizer, with all of its stages; codes (n, levels, positions)."""
        codes = self.model.quantizer.encode(encoded.latents, self.model.config.num_quantizers).transpose(0, 1)
        return encoded._replace(latents=self.model.quantizer.decode(codes)), codes

    def decode(self, quantized: Encoded) -> Tensor:
        """quantized latents -> waveforms (n, channels, samples)."""
        half = self._half("decoder")
        hidden = half.upsample(quantized.latents).transpose(1, 2)
        hidden = half.decoder_transformer(hidden, use_cache=False)[0].transpose(1, 2)
        return fitted(getattr(half, "decoder_seanet", self.model.decoder)(hidden), quantized.samples)

    def _stack(self, name: str) -> Any:
        return getattr(self.model.quantizer, name)

    def _half(self, name: str) -> Any:
        # The library moved the parts of each half into a module of its own; before, they lay in the model.
        half = getattr(self.model, name)
        return half if hasattr(half, f"{name}_transformer") else self.model
