"""The tokenizers of Janus and LlamaGen are run by transformers, and compute what it, and their own code, would."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import State
from families import assert_close, claims, described, loaded, pictures, shapes_of
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from transformers import JanusVQVAE, JanusVQVAEConfig
from vqgan_twin import Twin

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.clustering.assignment import nearest
from codebook_tools.clustering.metric import COSINE_UNIT
from codebook_tools.codebook import Codebook
from codebook_tools.errors import CodebookError
from codebook_tools.models.families.diffusers_vqmodel import CODEBOOK
from codebook_tools.models.families.janus import whole
from codebook_tools.models.load import load_model
from codebook_tools.models.registry import FAMILIES, family_of

JANUS, LLAMAGEN = FAMILIES["janus-vqvae"], FAMILIES["llamagen"]

RENAMED = (
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.conv_blocks.\1.res."),
    (r"^decoder\.up\.(\d+)\.block\.", r"decoder.conv_blocks.\1.res."),
    (r"^encoder\.down\.", "encoder.conv_blocks."),
    (r"^decoder\.up\.", "decoder.conv_blocks."),
    (r"\.mid\.block_1\.", ".mid.0."),
    (r"\.mid\.attn_1\.", ".mid.1."),
    (r"\.mid\.block_2\.", ".mid.2."),
)


def in_llamagen_names(state: State, prefix: str = "") -> State:
    renamed = dict(state)
    for theirs, own in RENAMED:
        renamed = {re.sub(theirs, own, key): tensor for key, tensor in renamed.items()}
    recent = torch.arange(65536) % 16  # indices of the codes used last, not rows
    return {f"{prefix}{key}": tensor for key, tensor in renamed.items()} | {
        f"{prefix}quantize.codebook_used": recent.float()
    }


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[JanusVQVAE, Path]:
    """A JanusVQVAE of stride 4 with weights large enough to tell, and the directory that the library saved it in."""
    config = JanusVQVAEConfig(
        base_channels=32, channel_multiplier=[1, 2, 1], num_res_blocks=1, num_embeddings=16, embed_dim=8,
        latent_channels=12, num_patches=4,
    )  # fmt: skip
    model = JanusVQVAE(config).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            mean = float("norm" in name and name.endswith("weight"))
            parameter.copy_(torch.randn(parameter.shape, generator=random) * spread + mean)
        model.quantize.embedding.weight.copy_(normalize(model.quantize.embedding.weight))  # as we write them
    folder = tmp_path_factory.mktemp("janus") / "vqvae"
    model.save_pretrained(folder)
    return model, folder


def test_codes_and_reconstructions_are_those_of_the_library(library: tuple[JanusVQVAE, Path]) -> None:
    model, folder = library
    ours, images = loaded(JANUS, folder), pictures()
    codebook = Codebook(model.quantize.embedding.weight.detach(), COSINE_UNIT)
    with torch.no_grad():
        latents = ours.encode(images)
        codes = nearest(latents.movedim(1, -1).flatten(0, -2), codebook).reshape(2, -1)
        assert torch.equal(latents, model.quant_conv(model.encoder(images)))
        _, _, found = model.quantize(latents)
        assert torch.equal(codes.flatten(), found.flatten()) and len(codes.unique()) > 3
        emitted = codebook.vectors[codes].reshape(2, 4, 4, 8).movedim(-1, 1)
        assert_close(ours.decode(emitted), model.decode(codes))
        assert_close(ours.decode(emitted), model(images).decoded_pixel_values)


def test_a_row_of_any_length_is_decoded_at_unit_length(library: tuple[JanusVQVAE, Path]) -> None:
    model, folder = library
    assert JANUS.metric == "cosine-unit"
    with torch.no_grad():
        longer = model.quantize.embedding.weight * 3
        emitted = normalize(longer).reshape(1, 4, 4, 8).movedim(-1, 1)
        assert_close(loaded(JANUS, folder).decode(emitted), model.decode(torch.arange(16)[None]))


@pytest.mark.parametrize(
    ("prefix", "family"), [("", "llamagen"), ("model.", "llamagen"), ("gen_vision_model.", "janus")]
)
def test_llamagens_names_give_the_same_network(
    prefix: str, family: str, library: tuple[JanusVQVAE, Path], tmp_path: Path
) -> None:
    _, folder = library
    state = in_llamagen_names(load_file(folder / "model.safetensors"), prefix)
    save_file(state, tmp_path / "vq.safetensors", {"format": "pt"})
    found = described(shapes_of(state))
    assert family_of(found) == family and set(claims(found).values()) == {prefix}
    renamed, plain = loaded(FAMILIES[family], tmp_path / "vq.safetensors"), loaded(JANUS, folder)
    with torch.no_grad():
        latents = plain.encode(pictures())
        assert torch.equal(renamed.encode(pictures()), latents)
        assert torch.equal(renamed.decode(latents), plain.decode(latents))


def test_it_computes_what_an_independent_twin_does(tmp_path: Path) -> None:
    twin = Twin((32, 32, 64), depth=2, attended=(2,), latent=12, dim=8)
    turned = {re.sub(r"(?<=decoder\.up\.)\d", lambda i: str(2 - int(i[0])), key): t for key, t in twin.state.items()}
    save_file(in_llamagen_names(turned), tmp_path / "vq.safetensors", {"format": "pt"})
    network = loaded(LLAMAGEN, tmp_path / "vq.safetensors")
    with torch.no_grad():
        latents = twin.encode(pictures())
        assert_close(network.encode(pictures()), latents)
        assert_close(network.decode(latents), twin.decode(latents))


def test_gradients_reach_every_layer_and_are_right(library: tuple[JanusVQVAE, Path]) -> None:
    """The library multiplies in place."""
    network = loaded(JANUS, library[1]).double()
    images = pictures().double().requires_grad_()
    network.decode(network.encode(images)).square().mean().backward()
    still = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert still == [f"model.{CODEBOOK}"]
    assert images.grad is not None
    step = 1e-5 * images.grad / images.grad.norm()
    with torch.no_grad():
        above, below = (network.decode(network.encode(images + side * step)).square().mean() for side in (1, -1))
    assert float((above - below) / 2e-5) == pytest.approx(float(images.grad.norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.down.0.attn.0.q.weight": (32, 32, 1, 1)}, "encoder.down.0.attn.0.q.weight would be missing"),
        ({"encoder.conv_in.weight": (64, 3, 3, 3)}, "encoder.conv_in.bias and "),
        (
            {"encoder.conv_in.weight": (48, 3, 3, 3)},
            "transformers makes no JanusVQVAE of described.safetensors: ValueError",
        ),
    ],
)
def test_what_transformers_cannot_build_is_refused_in_one_line(
    change: dict[str, tuple[int, ...]], message: str, library: tuple[JanusVQVAE, Path]
) -> None:
    checkpoint = described(shapes_of(library[0].state_dict()) | change)
    assert JANUS.prefix(checkpoint) == "" and JANUS.make is not None
    with pytest.raises(CodebookError, match=re.escape(message)) as refused:
        JANUS.make(checkpoint.shapes, checkpoint)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_embeddings": 16}, None),
        ({"vq_config": {"num_embeddings": 16}}, "generation_head.vision_head"),
        ({"gen_vision_config": {"params": {}}}, "gen_head.vision_head"),
    ],
)
def test_a_whole_janus_is_warned_of(config: dict[str, object], said: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    warnings = whole(replace(described({}), config_path=tmp_path / "config.json"))
    assert (said is None and not warnings) or (said or "") in warnings[0]


def test_rows_that_the_library_looks_up_as_they_stand_are_warned_of(
    library: tuple[JanusVQVAE, Path], tmp_path: Path
) -> None:
    path = tmp_path / "vqvae"
    shutil.copytree(library[1], path)
    assert load_model(read_checkpoint(path)).caveats == ()
    state = load_file(path / "model.safetensors")
    save_file(state | {CODEBOOK: 3 * state[CODEBOOK]}, path / "model.safetensors", {"format": "pt"})
    assert "are 3 to 3 long" in load_model(read_checkpoint(path)).caveats[0]
