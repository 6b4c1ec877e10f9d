"""The tokenizers of Janus and LlamaGen, run by the JanusVQVAE of transformers, which is built from the shapes.

Both are one network: a JanusVQVAE renames LlamaGen's layers. Its quantizer normalizes codes only at decode, the
original one at lookup too; on unit rows, which are what is written, the two agree.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.checkpoints.tensors import Shapes
from codebook_tools.models.families._layout import Signature, check_whole, count
from codebook_tools.models.families.diffusers_vqmodel import CODEBOOK
from codebook_tools.models.family import Family

if TYPE_CHECKING:
    from torch.nn import Module

_BOTH = (CODEBOOK, "encoder.conv_in.weight", "post_quant_conv.weight", "decoder.conv_out.weight")
_JANUS = Signature((*_BOTH, "encoder.down.0.block.0.conv1.weight", "decoder.up.0.upsample.conv.weight"))
_LLAMAGEN = Signature(
    (*_BOTH, "encoder.conv_blocks.0.res.0.conv1.weight", "decoder.conv_blocks.0.upsample.conv.weight")
)

_LLAMAGEN_NAMES = {
    "mid.block_1": "mid.0", "mid.attn_1": "mid.1", "mid.block_2": "mid.2",
    "encoder.down": "encoder.conv_blocks", "decoder.up": "decoder.conv_blocks", "block": "res",
}  # fmt: skip
"""Parts of a name in transformers, and what LlamaGen calls them; in this order."""


def file_key(name: str, shapes: Shapes) -> str:
    """The file's key of the tensor that the network calls `name`."""
    key = name.removeprefix("model.")
    if key in shapes:
        return key
    for part, theirs in _LLAMAGEN_NAMES.items():
        key = key.replace(f"{part}.", f"{theirs}.")
    return key


def make(shapes: Shapes, checkpoint: Checkpoint) -> Module:
    """A fresh network. Raises CodebookError where transformers has none that is built so."""
    from codebook_tools.models.networks.janus import JanusVQ

    def channels(name: str, axis: int = 0) -> int:
        return shapes[file_key(f"{name}.weight", shapes)][axis]

    size, dim = shapes[CODEBOOK]
    first = file_key("encoder.down.0.block.0.conv1.weight", shapes)
    levels = range(count(shapes, first.partition(".0.")[0]))
    base = channels("encoder.conv_in")
    config = {
        "in_channels": channels("encoder.conv_in", 1),
        "out_channels": channels("decoder.conv_out"),
        "base_channels": base,
        "channel_multiplier": [max(1, channels(f"encoder.down.{level}.block.0.conv1") // base) for level in levels],
        "num_res_blocks": count(shapes, first.partition(".0.conv1")[0]),
        "latent_channels": channels("post_quant_conv"),
        "num_embeddings": size,
        "embed_dim": dim,
    }
    network = JanusVQ(config, checkpoint.path)
    check_whole(network, shapes, file_key, checkpoint.path, "the JanusVQVAE of transformers")
    return network


_UNIT = 1e-2  # half precision, and rows that drifted a little, are within

_AROUND = {
    "vq_config": "generation_embeddings and generation_head.vision_head",
    "gen_vision_config": "gen_embed and gen_head.vision_head",
}
"""Parts of a whole Janus's language model that have a row per code, by an entry of its config."""


def whole(checkpoint: Checkpoint) -> tuple[str, ...]:
    """A warning where the tokenizer is part of a whole Janus."""
    rows = next((rows for entry, rows in _AROUND.items() if entry in (checkpoint.config or {})), None)
    if rows is None:
        return ()
    return (
        f"this is a whole Janus, with a row for each code in {rows}: they must follow the codes (codebook remap), and "
        "while K is another than theirs the result does not load",
    )


def unlike_original(checkpoint: Checkpoint) -> tuple[str, ...]:
    """`whole`, and a warning where rows are not of unit length: the quantizer of transformers does not normalize."""
    key = (_JANUS.prefix(checkpoint) or "") + CODEBOOK
    lengths = checkpoint.tensor(key).float().norm(dim=1)
    if bool((lengths - 1).abs().max() < _UNIT):
        return whole(checkpoint)
    return (
        *whole(checkpoint),
        f"rows of {key} are {float(lengths.min()):.3g} to {float(lengths.max()):.3g} long: a JanusVQVAE looks them up "
        "as they stand, the original Janus by their direction, which is what is done here; the library's own tokens of "
        "this file are others. What is written has rows of length 1, on which both agree",
    )


def _original_prefix(checkpoint: Checkpoint) -> str | None:
    prefix = _LLAMAGEN.prefix(checkpoint)
    return prefix if prefix is not None and prefix.endswith("gen_vision_model.") else None


_JANUS_VQVAE = Family(
    prefix=_JANUS.prefix,
    make=make,
    file_key=file_key,
    metric="cosine-unit",
    config_key="vq_config.num_embeddings",
    caveats=whole,
)
FAMILIES = {
    "janus-vqvae": replace(_JANUS_VQVAE, caveats=unlike_original),
    "janus": replace(_JANUS_VQVAE, prefix=_original_prefix, config_key="gen_vision_config.params.image_token_size"),
    # The entry is that of the config which huggingface_hub's mixin writes for LlamaGen's own VQModel.
    "llamagen": replace(_JANUS_VQVAE, prefix=_LLAMAGEN.prefix, config_key="codebook_size"),
}
"""Files of transformers; of DeepSeek, in LlamaGen's names; of LlamaGen."""
