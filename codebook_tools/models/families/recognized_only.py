"""Layouts that are recognized, but whose networks are not run: a surgery takes latents or counts from a file."""

from __future__ import annotations

from codebook_tools.models.families._layout import Signature
from codebook_tools.models.families.diffusers_vqmodel import CODEBOOK
from codebook_tools.models.family import Family


def _family(why_not: str, signature: Signature, config_key: str | None = None, metric: str = "euclidean") -> Family:
    """A record without a network."""
    return Family(
        prefix=signature.prefix,
        make=None,
        why_not=f"{why_not}; --latents or --stats in place of images still change its codebook",
        metric=metric,
        config_key=config_key,
    )


FAMILIES = {
    "var": _family(
        "a VAR tokenizer uses one codebook at every scale of an image in turn, each on what the coarser ones left, and "
        "its file does not say which scales: its networks cannot be fine-tuned here",
        Signature((CODEBOOK, "quantize.ema_vocab_hit_SV")),
    ),
    "titok": _family(
        "TiTok's transformers are in no library: its networks cannot be fine-tuned here",
        Signature((CODEBOOK, "latent_tokens")),
        "model.vq_model.codebook_size",
        "cosine-unit",
    ),
    "chameleon-vqvae": _family(
        "a ChameleonVQVAE has no decoder, so nothing can be reconstructed with it, measured or fine-tuned",
        Signature((CODEBOOK, "encoder.down.0.block.0.conv1.weight", "quant_conv.weight"), lacks=("decoder.",)),
        "vq_config.num_embeddings",
    ),
    "emu3-vqvae": _family(
        "an Emu3VQVAE encodes clips of frames, (n, time, channels, height, width), where images or audio are expected: "
        "its networks cannot be fine-tuned here",
        Signature((CODEBOOK, "quant_conv.conv.weight", "post_quant_conv.conv.weight")),
        "vq_config.codebook_size",
    ),
    "glm-image-vqvae": _family(
        "a GlmImageVQVAE has neither encoder nor decoder, so no image goes through it, to be measured or fine-tuned",
        Signature((CODEBOOK, "quant_conv.weight", "post_quant_conv.weight"), lacks=("encoder.", "decoder.")),
        "vq_config.num_embeddings",
        "cosine-unit",
    ),
    "paella-vqmodel": _family(
        "a PaellaVQModel decodes latents as they are and never looks at its codebook unless decode is called with "
        "force_not_quantize=False, so there is nothing to measure or fine-tune",
        Signature(("vquantizer.embedding.weight", "in_block.1.weight", "out_block.0.weight")),
        "num_vq_embeddings",
    ),
}
