"""Which family claims which layout; and of those that are not run, that they say why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import claims, described, inner_shapes
from safetensors.torch import load_file, save_file
from state_dicts import SURVEY, surveyed

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.models.families import recognized_only
from codebook_tools.models.registry import FAMILIES

CLAIMED = {
    "diffusers VQModel": ("diffusers-vqmodel", ""),
    "diffusers PaellaVQModel": ("paella-vqmodel", ""),
    "HF Encodec": ("encodec", ""),
    "HF Dac": ("dac", ""),
    "HF ChameleonVQVAE": ("chameleon-vqvae", ""),
    "HF Chameleon full": ("chameleon-vqvae", "model.vqmodel."),
    "HF JanusVQVAE": ("janus-vqvae", ""),
    "HF Janus full": ("janus-vqvae", "model.vqmodel."),
    "HF GlmImageVQVAE (D>K)": ("glm-image-vqvae", ""),
    "HF Emu3VQVAE": ("emu3-vqvae", ""),
    "LlamaGen VQ-16": ("llamagen", ""),
    "VAR VQVAE": ("var", ""),
    "TiTok (2 codebooks)": ("titok", ""),
}


@surveyed
@pytest.mark.parametrize("name", SURVEY)
def test_a_surveyed_layout_is_claimed_by_its_own_family_alone(name: str) -> None:
    found = claims(described(SURVEY[name]["tensors"]))
    assert list(found.items()) == ([CLAIMED[name]] if name in CLAIMED else [])


@surveyed
@pytest.mark.parametrize("name", ["HF JanusVQVAE", "HF Janus full", "LlamaGen VQ-16"])
def test_a_surveyed_layout_is_all_that_its_network_holds(name: str) -> None:
    family, prefix = CLAIMED[name]
    checkpoint = described(SURVEY[name]["tensors"])
    inner = inner_shapes(checkpoint, prefix)
    record = FAMILIES[family]
    assert record.make is not None
    state = record.make(inner, checkpoint).state_dict()
    wanted = {record.file_key(key, inner): tuple(tensor.shape) for key, tensor in state.items()}
    assert wanted == {key: shape for key, shape in inner.items() if key != "quantize.codebook_used"}


@pytest.mark.parametrize("name", recognized_only.FAMILIES)
def test_what_is_not_run_says_why_and_what_to_do(name: str) -> None:
    record = FAMILIES[name]
    assert record.make is None
    assert "--latents" in record.why_not and "\n" not in record.why_not and not record.why_not.endswith(".")
    assert record.metric in ("euclidean", "cosine-unit")


def chameleon() -> Any:
    from transformers import ChameleonVQVAE, ChameleonVQVAEConfig

    return ChameleonVQVAE(
        ChameleonVQVAEConfig(
            embed_dim=8,
            num_embeddings=16,
            latent_channels=8,
            base_channels=32,
            channel_multiplier=[1],
            num_res_blocks=1,
        )
    )


def emu3() -> Any:
    from transformers import Emu3VQVAE, Emu3VQVAEConfig

    return Emu3VQVAE(
        Emu3VQVAEConfig(
            codebook_size=16, base_channels=32, channel_multiplier=[1], num_res_blocks=1, attn_resolutions=[]
        )
    )


def glm_image() -> Any:
    library = pytest.importorskip("transformers.models.glm_image", reason="not in the oldest supported version")
    return library.GlmImageVQVAE(library.GlmImageVQVAEConfig(embed_dim=8, num_embeddings=16, latent_channels=4))


def paella() -> Any:
    folder = "diffusers.pipelines.deprecated.wuerstchen"
    library = pytest.importorskip(
        f"{folder}.modeling_paella_vq_model", reason="elsewhere in the oldest supported version"
    )
    return library.PaellaVQModel(levels=1, bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=16)


OF_LIBRARIES: dict[str, Callable[[], Any]] = {
    "chameleon-vqvae": chameleon, "emu3-vqvae": emu3, "glm-image-vqvae": glm_image, "paella-vqmodel": paella
}  # fmt: skip


@pytest.mark.parametrize("name", OF_LIBRARIES)
def test_the_librarys_own_file_is_recognised_and_its_k_is_where_the_record_says(name: str, tmp_path: Path) -> None:
    model = OF_LIBRARIES[name]()
    model.save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    assert claims(checkpoint) == {name: ""}
    entry = (FAMILIES[name].config_key or "").rpartition(".")[2]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config[entry] == 16
    (tmp_path / "config.json").write_text(json.dumps(config | {entry: 5}))
    state = load_file(checkpoint.path)
    (codes,) = (key for key in state if key.endswith("embedding.weight"))
    kept = state[codes][:5].clone()
    save_file(state | {codes: kept}, checkpoint.path, {"format": "pt"})
    assert type(model).from_pretrained(tmp_path).state_dict()[codes].equal(kept)
