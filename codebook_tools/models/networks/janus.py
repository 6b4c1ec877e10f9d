"""The network of Janus and LlamaGen: the JanusVQVAE of the transformers library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from codebook_tools.errors import CodebookError
from codebook_tools.runtime.optional import require


class JanusVQ(nn.Module):
    """A JanusVQVAE with fresh weights.

    Its own `encode` returns indices and its own `decode` takes them, on a fixed grid, so neither is used.

    Args:
        config: For a JanusVQVAEConfig.
        path: Of the file whose shapes gave the config, for messages.

    Raises:
        CodebookError: The library is missing, or refuses the config.
    """

    def __init__(self, config: Mapping[str, object], path: Path) -> None:
        super().__init__()
        self.model: Any = _build(config, path)

    def encode(self, images: Tensor) -> Tensor:
        """images (n, channels, height, width) in [-1, 1] -> latents (n, dim, *grid), not normalized."""
        latents: Tensor = self.model.quant_conv(self.model.encoder(images))
        return latents

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The library's own quantizer: latents (n, dim, *grid) -> quantized, of the same shape, and codes (n, *grid).

        Its lookup does not normalize: on rows of unit length it chooses as the original does.
        """
        quantized, _, codes = self.model.quantize(latents)
        return quantized, codes.reshape(len(latents), *latents.shape[2:])

    def decode(self, quantized: Tensor) -> Tensor:
        """quantized (n, dim, *grid), of unit length -> images (n, channels, height, width)."""
        images: Tensor = self.model.decoder(self.model.post_quant_conv(quantized))
        return images


def _build(config: Mapping[str, object], path: Path) -> nn.Module:
    network, described = require("a JanusVQVAE", "transformers", "transformers", "JanusVQVAE", "JanusVQVAEConfig")
    try:
        model: nn.Module = network(described(**config))
    except Exception as error:  # whatever the library makes of shapes that are amiss
        reason = str(error).partition("\n")[0]
        raise CodebookError(f"transformers makes no JanusVQVAE of {path}: {type(error).__name__}: {reason}") from error
    return model
