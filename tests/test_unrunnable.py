"""Which family claims which layout; and of those that are not run, that they say why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import described

from codebook_tools.codebook import Emit, Lookup
from codebook_tools.models import diffusers_vqmodel, janus, taming, unrunnable
from codebook_tools.models.family import Family

FAMILIES = {
    "diffusers-vqmodel": diffusers_vqmodel.FAMILY, "taming": taming.FAMILY, **janus.FAMILIES, **unrunnable.FAMILIES
}  # fmt: skip

LAYOUTS_JSON = Path(__file__).parents[1] / ".." / "shared" / "data" / "layouts.json"
SURVEY = json.loads(LAYOUTS_JSON.read_text()) if LAYOUTS_JSON.exists() else {}

CLAIMED = {
    "diffusers VQModel": ("diffusers-vqmodel", ""),
    "diffusers PaellaVQModel": ("paella-vqmodel", ""),
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


@pytest.mark.skipif(not SURVEY, reason="../shared/data/layouts.json is absent")
@pytest.mark.parametrize("name", SURVEY)
def test_a_surveyed_layout_is_claimed_by_its_own_family_alone(name: str) -> None:
    checkpoint = described({key: tuple(shape) for key, shape in SURVEY[name]["tensors"].items()})
    found = [(family, record.prefix(checkpoint)) for family, record in FAMILIES.items()]
    assert [claim for claim in found if claim[1] is not None] == ([CLAIMED[name]] if name in CLAIMED else [])


@pytest.mark.skipif(not SURVEY, reason="../shared/data/layouts.json is absent")
@pytest.mark.parametrize("name", ["HF JanusVQVAE", "HF Janus full", "LlamaGen VQ-16"])
def test_a_surveyed_layout_is_all_that_its_network_holds(name: str) -> None:
    family, prefix = CLAIMED[name]
    checkpoint = described({key: tuple(shape) for key, shape in SURVEY[name]["tensors"].items()})
    inner = {key.removeprefix(prefix): shape for key, shape in checkpoint.shapes.items() if key.startswith(prefix)}
    record = FAMILIES[family]
    assert record.make is not None
    state = record.make(inner, checkpoint).state_dict()
    wanted = {record.file_key(key, inner): tuple(tensor.shape) for key, tensor in state.items()}
    assert wanted == {key: shape for key, shape in inner.items() if key != "quantize.codebook_used"}


@pytest.mark.parametrize("name", unrunnable.FAMILIES)
def test_what_is_not_run_says_why_and_what_to_do(name: str) -> None:
    record: Family = FAMILIES[name]
    assert record.make is None
    assert "--latents" in record.why_not and "\n" not in record.why_not and not record.why_not.endswith(".")
    assert (record.emit is Emit.UNIT) == (record.lookup is Lookup.COSINE)
