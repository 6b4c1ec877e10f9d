"""The VQModel of the diffusers library (LDM, MoVQ, VQ-Diffusion, aMUSEd), built by that library from its config."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.checkpoints.tensors import Shapes
from codebook_tools.errors import CodebookError
from codebook_tools.models.family import Family

if TYPE_CHECKING:
    from torch.nn import Module

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


def prefix_of(checkpoint: Checkpoint) -> str | None:
    """The empty prefix where tensors and config are a VQModel's, None for another layout.

    A file without a config is recognized too, so that the user is asked for the config.
    """
    shapes = checkpoint.shapes
    fits = len(shapes.get(CODEBOOK, ())) == 2 and all(len(shapes.get(f"{name}.weight", ())) == 4 for name in _LAYERS)
    if not fits or not any(key.startswith("decoder.up_blocks.") for key in shapes):
        return None
    config = checkpoint.config
    described = config is None or config.get("_class_name", "VQModel" if CONFIG_KEY in config else None) == "VQModel"
    return "" if described else None


def make(shapes: Shapes, checkpoint: Checkpoint) -> Module:
    """A fresh network for the config. Raises CodebookError where there is no config, or the library refuses it."""
    if checkpoint.config is None:
        raise CodebookError(
            f"{checkpoint.path} is a diffusers VQModel without its config; put that beside it, as config.json"
        )
    from codebook_tools.models.networks.diffusers_vqmodel import DiffusersVQModel

    return DiffusersVQModel(checkpoint.config, checkpoint.config_path)


# The library renamed its attention layers; files keep the names they were saved with, and it reads both.
_OLDER = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def file_key(name: str, shapes: Shapes) -> str:
    """The file's key of the tensor that the network calls `name`, by the library's names or its older ones."""
    key = name.removeprefix("model.")
    older = next((key.replace(new, old) for new, old in _OLDER.items() if new in key), key)
    return older if key not in shapes and older in shapes else key


def caveats(checkpoint: Checkpoint) -> tuple[str, ...]:
    """A warning for MoVQ, whose pipelines may ignore the codebook."""
    if (checkpoint.config or {}).get("norm_type") != "spatial":
        return ()
    return (
        "norm_type is spatial, as in Kandinsky's MoVQ: pipelines that decode with force_not_quantize=True, as "
        "Kandinsky's do, never look at the codebook, and a new one changes nothing there",
    )


def pretrained(folder: Path) -> tuple[Module, list[str], list[str]]:
    """As in Family."""
    from codebook_tools.models.networks.diffusers_vqmodel import DiffusersVQModel

    return DiffusersVQModel.pretrained(folder)


FAMILY = Family(
    prefix=prefix_of,
    make=make,
    file_key=file_key,
    config_key=CONFIG_KEY,
    default_size=256,
    caveats=caveats,
    pretrained=pretrained,
)
