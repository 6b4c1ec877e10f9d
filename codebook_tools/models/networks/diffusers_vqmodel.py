"""The network of a diffusers VQModel, and of the VQGANs that diffusers can build."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from codebook_tools.errors import CodebookError
from codebook_tools.runtime.optional import require


class DiffusersVQModel(nn.Module):
    """A diffusers VQModel with fresh weights.

    Args:
        config: Of the VQModel.
        path: Of the config, for messages.

    Raises:
        CodebookError: The library is missing, or refuses the config.
    """

    def __init__(self, config: Mapping[str, object], path: Path | None) -> None:
        super().__init__()
        self.model: Any = _build(config, path)
        self._note(config)

    @classmethod
    def pretrained(cls, folder: Path) -> tuple[DiffusersVQModel, list[str], list[str]]:
        """The network as the library loads a directory, the keys that it missed, and the unexpected ones."""
        from diffusers import VQModel

        model, info = VQModel.from_pretrained(folder, output_loading_info=True)
        network = cls.__new__(cls)
        nn.Module.__init__(network)
        network.model = model
        network._note(model.config)
        return network, list(info["missing_keys"]), list(info["unexpected_keys"])

    def _note(self, config: Mapping[str, object]) -> None:
        self._spatial = config.get("norm_type") == "spatial"  # the codes modulate the decoder's norms, as in MoVQ

    def encode(self, images: Tensor) -> Tensor:
        """images (n, channels, height, width) in the model's range -> latents (n, dim, *grid)."""
        latents: Tensor = self.model.encode(images).latents
        return latents

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The library's own quantizer: latents (n, dim, *grid) -> quantized alike, and codes (n, *grid)."""
        quantized, _, (_, _, codes) = self.model.quantize(latents)
        return quantized, codes.reshape(len(latents), *latents.shape[2:])

    def decode(self, quantized: Tensor) -> Tensor:
        """quantized (n, dim, *grid) -> images (n, channels, height, width)."""
        # By its parts: the library's own `decode` quantizes again or, with lookup_from_codebook, takes indices.
        modulation = quantized if self._spatial else None
        images: Tensor = self.model.decoder(self.model.post_quant_conv(quantized), modulation)
        return images


def _build(config: Mapping[str, object], path: Path | None) -> nn.Module:
    (network,) = require("a VQModel", "diffusers", "diffusers", "VQModel")
    try:
        model: nn.Module = network.from_config(dict(config))
    except Exception as error:  # whatever the library makes of a config that is amiss
        reason = str(error).partition("\n")[0]
        raise CodebookError(f"diffusers makes no VQModel of {path}: {type(error).__name__}: {reason}") from error
    return model
