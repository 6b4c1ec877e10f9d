"""Families of image tokenizers: each recognizes its own layout alone, and its network computes what others compute."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import State
from families import assert_close, claims, described, inner_shapes, loaded, pictures, shapes_of
from image_models import BOOK, in_llamagen_names, janus, save_janus, turned, write
from library_models import OF_LIBRARIES
from safetensors.torch import load_file, save_file, save_model
from state_dicts import SURVEY, surveyed
from torch import Tensor, nn
from tutorial_networks import Leaky, Reference, Shared, TwoLevels, mishalaskin_state, pytorch_vae_state, two_levels
from vqgan_twin import Twin

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.errors import CodebookError
from codebook_tools.models.families import recognized_only
from codebook_tools.models.families.janus import whole
from codebook_tools.models.load import load_model
from codebook_tools.models.registry import FAMILIES, family_of

# --- what the networks compute ---------------------------------------------------------------------------------------
# Family, independent network with its `state`, `encode` and `decode`, and the dimension of its codes. Of taming's as
# in published configs, with fewer channels: f4 without attention; f8 with it at the coarsest level; without any, not
# even in the middle (vq-f4-noattn); MoVQ.
NETWORKS: dict[str, tuple[str, Callable[[], Any], int]] = {
    "f4": ("taming", partial(Twin, (32, 64, 128), depth=2, latent=3, dim=3), 3),
    "f8": ("taming", partial(Twin, (32, 64, 64), attended=(2,)), 4),
    "noattn": ("taming", partial(Twin, (32, 64), middle=False), 4),
    "attention halfway": ("taming", partial(Twin, (32, 64, 32), attended=(1,)), 4),
    "latent is not dim": ("taming", partial(Twin, (32, 64), latent=8, dim=5), 5),
    "grey to RGB": ("taming", partial(Twin, (32, 64), channels=(1, 3)), 4),
    "one level": ("taming", partial(Twin, (32,), attended=(0,)), 4),
    "movq": ("taming", partial(Twin, (32, 64), depth=2, attended=(1,), movq=True), 4),
    "LlamaGen": ("llamagen", partial(Twin, (32, 32, 64), depth=2, attended=(2,), latent=12, dim=8), 8),
    "PyTorch-VAE": ("pytorch-vae", lambda: Leaky(pytorch_vae_state((4, 8), 6), 2, 6), 5),
    "PyTorch-VAE, one halving": ("pytorch-vae", lambda: Leaky(pytorch_vae_state((8,), 1), 1, 1), 5),
    "PyTorch-VAE, three": ("pytorch-vae", lambda: Leaky(pytorch_vae_state((4, 8, 12), 2), 3, 2), 5),
    "MishaLaskin, one layer": ("mishalaskin", lambda: Shared(mishalaskin_state(depth=1, dim=5)), 5),
    "MishaLaskin": ("mishalaskin", lambda: Shared(mishalaskin_state(depth=3, dim=8)), 8),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_what_an_independent_one_does_and_lets_gradients_through(name: str, tmp_path: Path) -> None:
    family, make, dim = NETWORKS[name]
    reference = make()
    state = in_llamagen_names(turned(reference.state)) if family == "llamagen" else reference.state
    network = loaded(FAMILIES[family], write(state, tmp_path / "model.safetensors"))
    images = pictures(1 if name == "grey to RGB" else 3)
    wide = images.double() if isinstance(reference, Reference) else images
    with torch.no_grad():
        latents = network.encode(images)
        assert_close(latents.double(), reference.encode(wide).double(), least=1e-3)
        codes = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
        expected = reference.decode(codes.double() if isinstance(reference, Reference) else codes)
        assert_close(network.decode(codes).double(), expected.double(), least=1e-3)
    network.decode(network.encode(images)).square().mean().backward()
    untouched = [key for key, parameter in network.named_parameters() if parameter.grad is None]
    assert [tuple(network.state_dict()[key].shape)[1] for key in untouched] == [dim]
    if isinstance(reference, Reference):
        used = {key for key in reference.used if key in state}
        assert len(state) - len(used) == 1  # the codebook


@pytest.mark.parametrize(("family", "blocks"), [("rosinality", 0), ("rosinality", 2), ("rosinality-2019", 2)])
def test_both_ages_of_rosinalitys_code_are_computed_as_published(family: str, blocks: int, tmp_path: Path) -> None:
    state, images = two_levels(blocks=blocks), pictures().double()
    network = loaded(FAMILIES[family], write(state, tmp_path / "model.safetensors")).double()
    now, then = (TwoLevels(state, in_place, blocks) for in_place in (False, True))
    reference = then if family == "rosinality-2019" else now
    indices: list[Tensor] = []

    def quantize(stage: int, latents: Tensor) -> Tensor:
        codes, chosen = reference.code(latents, reference.state[network.codebooks[stage]].T)
        indices.append(chosen)
        return latents + (codes - latents).detach()

    ours = network.decode(network.walk(network.encode(images), quantize))
    theirs, expected = reference.forward(images)
    assert all(torch.equal(a, b) and len(b.unique()) > 1 for a, b in zip(indices, expected, strict=True))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert blocks == 0 or (now.forward(images)[0] - then.forward(images)[0]).abs().max() > 1e-3
    beside = {key for key in state if key.endswith((".embed", ".cluster_size", ".embed_avg"))}
    assert reference.used >= set(state) - beside
    ours.square().sum().backward()
    untouched = [name for name, tensor in network.named_parameters() if tensor.grad is None or not tensor.grad.any()]
    assert untouched == list(network.codebooks)
    assert [tuple(network.state_dict()[key].shape) for key in network.codebooks] == [(6, 7), (6, 11)]


def test_mishalaskins_repeated_layers_count_though_the_file_holds_them_once(tmp_path: Path) -> None:
    state = mishalaskin_state(depth=3)
    holder = nn.Module()
    for key, tensor in state.items():  # safetensors goes by shared storage
        owner = holder
        for part in key.split(".")[:-1]:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_buffer(key.rpartition(".")[2], tensor)
    path = tmp_path / "model.safetensors"
    save_model(holder, str(path))
    checkpoint, family, images = read_checkpoint(path), FAMILIES["mishalaskin"], pictures()
    assert len(checkpoint.shapes) == len(state) - 8 and family.prefix(checkpoint) == "" and family.make is not None
    network: Any = family.make(checkpoint.shapes, checkpoint)
    stored = checkpoint.tensors()
    network.load_state_dict({n: stored[family.file_key(n, checkpoint.shapes)] for n in network.state_dict()})
    with torch.no_grad():
        assert_close(network.encode(images).double(), Shared(state).encode(images.double()))


# --- Janus -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JanusVQVAE as the library saved it: do not write into it."""
    return save_janus(tmp_path_factory.mktemp("janus"))


def test_llamagens_names_give_the_same_network(library: Path, tmp_path: Path) -> None:
    for prefix, family in (("model.", "llamagen"), ("gen_vision_model.", "janus")):
        state = in_llamagen_names(load_file(library / "model.safetensors"), prefix)
        path = write(state, tmp_path / "vq.safetensors")
        checkpoint = described(shapes_of(state))
        assert family_of(checkpoint) == family and set(claims(checkpoint).values()) == {prefix}
        renamed, plain = loaded(FAMILIES[family], path), loaded(FAMILIES["janus-vqvae"], library)
        with torch.no_grad():
            latents = plain.encode(pictures())
            assert torch.equal(renamed.encode(pictures()), latents)
            assert torch.equal(renamed.decode(latents), plain.decode(latents))


def test_gradients_of_janus_are_right_though_the_library_multiplies_in_place(library: Path) -> None:
    network = loaded(FAMILIES["janus-vqvae"], library).double()
    images = pictures().double().requires_grad_()
    network.decode(network.encode(images)).square().mean().backward()
    assert [name for name, tensor in network.named_parameters() if tensor.grad is None] == [f"model.{BOOK}"]
    assert images.grad is not None
    step = 1e-5 * images.grad / images.grad.norm()
    with torch.no_grad():
        above, below = (network.decode(network.encode(images + side * step)).square().mean() for side in (1, -1))
    assert float((above - below) / 2e-5) == pytest.approx(float(images.grad.norm()), rel=1e-5)


def test_a_whole_janus_is_warned_of(tmp_path: Path) -> None:
    vq: dict[str, object] = {"num_embeddings": 16}
    parts = {
        "generation_head.vision_head": {"vq_config": vq},
        "gen_head.vision_head": {"gen_vision_config": {"params": {}}},
    }
    for part, config in [*parts.items(), (None, vq)]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        warnings = whole(replace(described({}), config_path=tmp_path / "config.json"))
        assert part in warnings[0] if part else not warnings


def test_rows_that_the_library_does_not_normalize_are_warned_of(library: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(library, tmp_path / "vqvae"))
    assert load_model(read_checkpoint(path)).caveats == ()
    state = load_file(path / "model.safetensors")
    save_file(state | {BOOK: 3 * state[BOOK]}, path / "model.safetensors", {"format": "pt"})
    assert "are 3 to 3 long" in load_model(read_checkpoint(path)).caveats[0]


# --- recognition -----------------------------------------------------------------------------------------------------
STATES: dict[str, Callable[[], State]] = {
    "rosinality": two_levels, "pytorch-vae": pytorch_vae_state, "mishalaskin": mishalaskin_state,
    "taming": lambda: Twin().state,
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "model.first_stage_model."])
@pytest.mark.parametrize("name", STATES)
def test_a_family_knows_its_own_layout_and_no_other_does(name: str, prefix: str) -> None:
    shapes = {prefix + key: shape for key, shape in shapes_of(STATES[name]()).items()}
    others = {"epoch": (), "discriminator.blocks.0.weight": (8, 3, 4, 4), "loss.perceptual.net.0.weight": (1,)}
    assert claims(described(shapes | others)) == {name: prefix}
    assert family_of(described(shapes | others)) == name


def test_a_model_is_read_from_its_prefix_and_not_from_a_copy_beside_it(tmp_path: Path) -> None:
    one = Twin()
    state = {f"z_model.{key}": tensor for key, tensor in one.state.items()}
    average = {f"a_ema_model.{key}": tensor * 0.5 for key, tensor in one.state.items()}
    path = write(state | average, tmp_path / "vqgan.safetensors")
    with torch.no_grad():
        assert_close(loaded(FAMILIES["taming"], path).encode(pictures()), one.encode(pictures()))


ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "a layer that is not published": ("rosinality", {"enc_b.blocks.6.attention.weight": (8, 8, 1, 1)}),
    "one level more": ("rosinality", {"enc_t.blocks.0.weight": (4, 8, 3, 3)}),
    "a top of stride 4": ("rosinality", {"enc_t.blocks.2.weight": (8, 4, 4, 4)}),
    "no codebook below": ("rosinality", {"quantize_b.embed": None}),
    "upsampled by interpolation": ("pytorch-vae", {"decoder.9.0.weight": None, "decoder.9.1.weight": (3, 4, 3, 3)}),
    "another number of doublings": ("pytorch-vae", {"decoder.8.0.weight": (8, 4, 3, 3)}),
    "a norm": ("pytorch-vae", {"encoder.0.1.weight": (4,)}),
    "a larger kernel": ("mishalaskin", {"encoder.conv_stack.4.weight": (8, 8, 5, 5)}),
    "SimVQ": ("taming", {"quantize.embedding_proj.weight": (16, 4)}),
    "CVQ-VAE": ("taming", {"quantize.embed_prob": (16, 4)}),
    "taming's remap": ("taming", {"quantize.used": (16, 4)}),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_network_that_is_only_nearly_so_is_not_claimed(odd: str) -> None:
    name, changes = ODD[odd]
    shapes: dict[str, Any] = {**shapes_of(STATES[name]()), **changes}
    assert claims(described({key: shape for key, shape in shapes.items() if shape is not None})) == {}


CLAIMED = {
    "diffusers VQModel": ("diffusers-vqmodel", ""), "diffusers PaellaVQModel": ("paella-vqmodel", ""),
    "HF Encodec": ("encodec", ""), "HF Dac": ("dac", ""), "HF ChameleonVQVAE": ("chameleon-vqvae", ""),
    "HF Chameleon full": ("chameleon-vqvae", "model.vqmodel."), "HF JanusVQVAE": ("janus-vqvae", ""),
    "HF Janus full": ("janus-vqvae", "model.vqmodel."), "HF GlmImageVQVAE (D>K)": ("glm-image-vqvae", ""),
    "HF Emu3VQVAE": ("emu3-vqvae", ""), "LlamaGen VQ-16": ("llamagen", ""), "VAR VQVAE": ("var", ""),
    "TiTok (2 codebooks)": ("titok", ""),
}  # fmt: skip


@surveyed
@pytest.mark.parametrize("name", SURVEY)
def test_a_surveyed_layout_is_claimed_by_its_own_family_alone_and_wholly(name: str) -> None:
    checkpoint = described(SURVEY[name]["tensors"])
    assert list(claims(checkpoint).items()) == ([CLAIMED[name]] if name in CLAIMED else [])
    if name in ("HF JanusVQVAE", "HF Janus full", "LlamaGen VQ-16"):
        family, prefix = CLAIMED[name]
        inner, record = inner_shapes(checkpoint, prefix), FAMILIES[family]
        assert record.make is not None
        state = record.make(inner, checkpoint).state_dict()
        wanted = {record.file_key(key, inner): tuple(tensor.shape) for key, tensor in state.items()}
        assert wanted == {key: shape for key, shape in inner.items() if key != "quantize.codebook_used"}


@pytest.mark.parametrize("name", OF_LIBRARIES)
def test_the_librarys_own_file_is_recognized_and_its_k_is_where_the_record_says(name: str, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("name", recognized_only.FAMILIES)
def test_what_is_not_run_says_why_and_what_to_do(name: str) -> None:
    record = FAMILIES[name]
    assert record.make is None and record.metric in ("euclidean", "cosine-unit")
    assert "--latents" in record.why_not and "\n" not in record.why_not and not record.why_not.endswith(".")


# --- what a library cannot build -------------------------------------------------------------------------------------
def without(part: str, **more: Any) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in shapes_of(Twin(**more).state).items() if part not in key}


def narrowed() -> dict[str, tuple[int, ...]]:
    """Every axis of 32 channels cut to 24, of 64 to 48."""
    cut = {32: 24, 64: 48}
    return {key: tuple(cut.get(n, n) for n in shape) for key, shape in without("nothing").items()}


def janus_shapes(**more: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return shapes_of(janus().state_dict()) | more


Q, CONV_IN = "encoder.down.0.attn.0.q.weight", "encoder.conv_in.weight"
ATTENDED, BLOCK = {"depth": 2, "attended": (1,)}, "encoder.down.1.block.1.conv1.weight"
REFUSED: dict[str, tuple[Callable[[], dict[str, tuple[int, ...]]], str]] = {
    "attention after one of two blocks": (
        lambda: without("encoder.down.1.attn.1", **ATTENDED), "encoder.down.1.attn.1"),
    "attention that only a later block has": (
        lambda: without("encoder.down.1.attn.0", **ATTENDED), "encoder.down.1.attn.1"),
    "a first level of other channels than its input": (
        lambda: without("nothing") | {CONV_IN: (64, 3, 3, 3)}, f"{CONV_IN} would be (32, 3, 3, 3), not (64, 3, 3, 3)"),
    "a block more in one level": (
        lambda: without("nothing") | {BLOCK: (64, 64, 3, 3)}, f"{BLOCK} would be missing, not (64, 64, 3, 3)"),
    "downsampling without a layer": (
        lambda: without("downsample"), "encoder.down.0.downsample.conv.weight and 1 more would be (32"),
    "norms of fewer groups": (narrowed, "must be divisible by num_groups"),
    "Janus, attention": (lambda: janus_shapes(**{Q: (32, 32, 1, 1)}), f"{Q} would be missing"),
    "Janus, another width": (lambda: janus_shapes(**{CONV_IN: (64, 3, 3, 3)}), "encoder.conv_in.bias and "),
    "Janus, a width that norms do not take": (
        lambda: janus_shapes(**{CONV_IN: (48, 3, 3, 3)}),
        "transformers makes no JanusVQVAE of described.safetensors: ValueError"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_library_cannot_build_is_refused_in_one_line(kind: str) -> None:
    shapes, message = REFUSED[kind]
    checkpoint, record = described(shapes()), FAMILIES["janus-vqvae" if "Janus" in kind else "taming"]
    assert record.prefix(checkpoint) == "" and record.make is not None
    with pytest.raises(CodebookError, match=re.escape(message)) as refused:
        record.make(checkpoint.shapes, checkpoint)
    assert "\n" not in str(refused.value)
