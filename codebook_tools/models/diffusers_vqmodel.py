"""The VQModel of the diffusers library (LDM, MoVQ, VQ-Diffusion, aMUSEd), built by that library from its config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from codebook_tools.checkpoints.reading import Checkpoint
from codebook_tools.errors import CodebookError
from codebook_tools.models.family import Family, Shapes

CODEBOOK = "quantize.embedding.weight"
CONFIG_KEY = "num_vq_embeddings"

_LAYERS = (
    "encoder.conv_in",
    "encoder.conv_out",
    "quant_conv",
    "post_quant_conv",
    "decoder.conv_in",
    "decoder.conv_out",
)


class DiffusersVQModel(nn.Module):
    """model: a diffusers VQModel. spatial: whether its decoder's norms are modulated by the codes, as in MoVQ."""

    def __init__(self, model: nn.Module, spatial: bool) -> None:
        super().__init__()
        self.model: Any = model
        self._spatial = spatial

    def encode(self, images: Tensor) -> Tensor:
        """images (n, channels, height, width) in the model's range -> latents (n, dim, *grid), not quantised."""
        latents: Tensor = self.model.encode(images).latents
        return latents

    def decode(self, quantised: Tensor) -> Tensor:
        """quantised (n, dim, *grid) -> images (n, channels, height, width)."""
        # By its parts: the library's own `decode` quantises again or, with lookup_from_codebook, takes indices.
        modulation = quantised if self._spatial else None
        images: Tensor = self.model.decoder(self.model.post_quant_conv(quantised), modulation)
        return images


def prefix_of(checkpoint: Checkpoint) -> str | None:
    """The empty prefix where tensors and config are a VQModel's, None where this is another layout.

    A file without a config is recognised too, so that it is the config that is asked for.
    """
    shapes = checkpoint.shapes
    fits = len(shapes.get(CODEBOOK, ())) == 2 and all(len(shapes.get(f"{name}.weight", ())) == 4 for name in _LAYERS)
    if not fits or not any(key.startswith("decoder.up_blocks.") for key in shapes):
        return None
    config = checkpoint.config
    described = config is None or config.get("_class_name", "VQModel" if CONFIG_KEY in config else None) == "VQModel"
    return "" if described else None


def make(shapes: Shapes, checkpoint: Checkpoint) -> DiffusersVQModel:
    """A fresh network after the config. Raises CodebookError where there is none, or it does not fit the tensors."""
    config, path = checkpoint.config, checkpoint.config_path
    if config is None:
        raise CodebookError(
            f"{checkpoint.path} is a diffusers VQModel without its config; put that beside it, as config.json"
        )
    return DiffusersVQModel(build(config, path), config.get("norm_type") == "spatial")


def build(config: Mapping[str, object], path: Path | None) -> nn.Module:
    """The library's own network, fresh, after a config found in `path`.

    Raises CodebookError where the library is missing or makes none.
    """
    try:
        from diffusers import VQModel
    except (ImportError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise CodebookError(f"a VQModel is built by the diffusers library: {reason}; pip install diffusers") from error
    try:
        model: nn.Module = VQModel.from_config(dict(config))
    except Exception as error:  # whatever the library makes of a config that is amiss
        reason = str(error).partition("\n")[0]
        raise CodebookError(f"diffusers makes no VQModel of {path}: {type(error).__name__}: {reason}") from error
    return model


# The library renamed its attention layers; files keep the names they were saved with, and it reads both.
_OLDER = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def file_key(name: str, shapes: Shapes) -> str:
    """The key under which the file holds what the network calls `name`."""
    key = name.removeprefix("model.")
    older = next((key.replace(new, old) for new, old in _OLDER.items() if new in key), key)
    return older if key not in shapes and older in shapes else key


def caveat(checkpoint: Checkpoint) -> str | None:
    """What a user should know of such a model."""
    if (checkpoint.config or {}).get("norm_type") != "spatial":
        return None
    return (
        "norm_type is spatial, as in Kandinsky's MoVQ: pipelines that decode with force_not_quantize=True, as "
        "Kandinsky's do, never look at the codebook, and a new one changes nothing there"
    )


FAMILY = Family(prefix=prefix_of, make=make, file_key=file_key, config_key=CONFIG_KEY, default_size=256, caveat=caveat)
