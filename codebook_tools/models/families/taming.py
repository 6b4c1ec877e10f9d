"""VQGANs of taming-transformers, latent diffusion's first stages and MoVQGAN, run by the VQModel of diffusers.

It is the same network under other names, which the file keeps. Shapes tell depth, channels and attention.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.checkpoints.tensors import Shapes
from codebook_tools.models.families._layout import Signature, check_whole, count
from codebook_tools.models.families.diffusers_vqmodel import CODEBOOK
from codebook_tools.models.family import Family

if TYPE_CHECKING:
    from torch.nn import Module

_SIGNATURE = Signature(
    has=(
        CODEBOOK,
        "encoder.conv_in.weight",
        "encoder.down.0.block.0.conv1.weight",
        "post_quant_conv.weight",
        "decoder.up.0.block.0.conv1.weight",
        "decoder.conv_out.weight",
    ),
    lacks=(
        "decoder.up.0.upsample.",  # Janus, which counts its decoder's levels the other way round
        "quantize.embedding_proj.",  # SimVQ: codes are a projection of the rows
        "quantize.embed_prob",  # CVQ-VAE, whose metric is an option
        "quantize.ema_vocab_hit_SV",  # VAR
        "quantize.used",  # taming's remap: codes under other numbers, a list of which would no longer fit
    ),
)

_NAMES = {
    "mid_block.resnets.0": "mid.block_1", "mid_block.attentions.0": "mid.attn_1", "mid_block.resnets.1": "mid.block_2",
    "down_blocks": "down", "up_blocks": "up", "downsamplers.0": "downsample", "upsamplers.0": "upsample",
    "resnets": "block", "attentions": "attn", "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out",
    "group_norm": "norm", "spatial_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip
"""Parts of a name in diffusers, and what taming calls them; in this order."""


def file_key(name: str, shapes: Shapes) -> str:
    """The file's key of the tensor that the network calls `name`."""
    key = name.removeprefix("model.")
    for part, theirs in _NAMES.items():
        key = key.replace(f"{part}.", f"{theirs}.")
    coarsest = count(shapes, "decoder.up") - 1  # taming counts from the finest level, diffusers in order of use
    return re.sub(r"(?<=^decoder\.up\.)\d+", lambda level: str(coarsest - int(level[0])), key)


def make(shapes: Shapes, checkpoint: Checkpoint) -> Module:
    """A fresh network. Raises CodebookError where diffusers has none that is built so."""
    from codebook_tools.models.networks.diffusers_vqmodel import DiffusersVQModel

    levels = range(count(shapes, "encoder.down"))

    def blocks(side: str, kind: str) -> list[str]:
        return [("Attn" if f"{side}.{level}.attn.0.q.weight" in shapes else "") + kind for level in levels]

    size, dim = shapes[CODEBOOK]
    config = {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "down_block_types": blocks("encoder.down", "DownEncoderBlock2D"),
        "up_block_types": blocks("decoder.up", "UpDecoderBlock2D")[::-1],
        "block_out_channels": [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in levels],
        "layers_per_block": count(shapes, "encoder.down.0.block"),
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
        "latent_channels": shapes["post_quant_conv.weight"][0],
        "num_vq_embeddings": size,
        "vq_embed_dim": dim,
        "norm_type": "spatial" if "decoder.norm_out.conv_y.weight" in shapes else "group",
    }
    network = DiffusersVQModel(config, checkpoint.path)
    check_whole(network, shapes, file_key, checkpoint.path, "the VQModel of diffusers")
    return network


FAMILY = Family(prefix=_SIGNATURE.prefix, make=make, file_key=file_key)
