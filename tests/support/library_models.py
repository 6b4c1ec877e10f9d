"""Tiny models of libraries whose networks are not run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def chameleon() -> Any:
    from transformers import ChameleonVQVAE, ChameleonVQVAEConfig

    config = ChameleonVQVAEConfig(
        embed_dim=8, num_embeddings=16, latent_channels=8, base_channels=32, channel_multiplier=[1], num_res_blocks=1
    )
    return ChameleonVQVAE(config)


def emu3() -> Any:
    from transformers import Emu3VQVAE, Emu3VQVAEConfig

    config = Emu3VQVAEConfig(
        codebook_size=16, base_channels=32, channel_multiplier=[1], num_res_blocks=1, attn_resolutions=[],
        hidden_size=32, num_attention_heads=1,
    )  # fmt: skip
    return Emu3VQVAE(config)


def glm_image() -> Any:
    library = pytest.importorskip("transformers.models.glm_image", reason="not in the oldest supported version")
    return library.GlmImageVQVAE(library.GlmImageVQVAEConfig(embed_dim=8, num_embeddings=16, latent_channels=4))


def paella() -> Any:
    folder = "diffusers.pipelines.deprecated.wuerstchen"
    module, reason = f"{folder}.modeling_paella_vq_model", "elsewhere in the oldest supported version"
    library = pytest.importorskip(module, reason=reason)
    return library.PaellaVQModel(levels=1, bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=16)


OF_LIBRARIES: dict[str, Callable[[], Any]] = {
    "chameleon-vqvae": chameleon, "emu3-vqvae": emu3, "glm-image-vqvae": glm_image, "paella-vqmodel": paella
}  # fmt: skip
