"""Image tokenizers of all kinds go through every command, and their own code finds in the result what we do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import State
from round_trips import (
    OPERATIONS,
    Operation,
    assert_averages_follow,
    assert_only_these_differ,
    assert_same_indices,
    operated,
)
from safetensors.torch import load_file, save_file
from test_janus import in_llamagen_names
from test_tutorials import Leaky, Shared, TwoLevels, mishalaskin_state, pytorch_vae_state, two_levels
from torch import Tensor
from torch.nn.functional import normalize
from vqgan_twin import Twin

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.models.load import load_model
from codebook_tools.models.user_network import make_network
from codebook_tools.workflows.request import Request

Seen = tuple[Tensor, list[Tensor]]
"""Images in the network's range, and indices (n, height, width) of every stage."""


@dataclass(frozen=True)
class Case:
    """save: writes a model of 16 codes to a folder, and says where. look: result, images in [-1, 1] -> what the model's
    own code, or an independent twin, makes of them. owned: parts of the names of what follows the codes."""

    family: str
    save: Callable[[Path], Path]
    look: Callable[[Path, Tensor], Seen]
    owned: tuple[str, ...]
    network: str = ""


def saved(state: State, path: Path) -> Path:
    save_file(
        {key: tensor.clone().contiguous() for key, tensor in state.items()}, path, {"format": "pt", "note": "by others"}
    )
    return path


def looked_up(latents: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes, and their indices, by brute force."""
    indices = (latents.movedim(1, -1)[..., None, :] - codes).square().sum(-1).argmin(-1)
    return codes[indices].movedim(-1, 1), indices


# --- transformers --------------------------------------------------------------------------------------------------


def save_janus(folder: Path) -> Path:
    from transformers import JanusVQVAE, JanusVQVAEConfig

    torch.manual_seed(0)
    config = JanusVQVAEConfig(
        base_channels=32, channel_multiplier=[1, 2, 1], num_res_blocks=1, num_embeddings=16, embed_dim=8,
        latent_channels=12, num_patches=4,
    )  # fmt: skip
    model = JanusVQVAE(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    model.quantize.embedding.weight.data = normalize(model.quantize.embedding.weight.data)
    model.save_pretrained(folder / "janus")
    return folder / "janus"


def look_by_janus(result: Path, images: Tensor) -> Seen:
    from transformers import JanusVQVAE

    model, told = JanusVQVAE.from_pretrained(result, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    rows = model.quantize.embedding.weight
    assert model.config.num_embeddings == len(rows) and torch.allclose(rows.norm(dim=1), torch.ones(len(rows)))
    _, _, tokens = model.eval().quantize(model.quant_conv(model.encoder(images)))
    return model.decode(tokens.reshape(len(images), -1)), [tokens.reshape(len(images), 4, 4)]


# --- lucidrains ----------------------------------------------------------------------------------------------------

OWN = """
from torch import nn
from vector_quantize_pytorch import GroupedResidualVQ, ResidualVQ, SimVQ, VectorQuantize


class Own(nn.Module):
    def __init__(self, quantiser):
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, 6, 4, 4), nn.ConvTranspose2d(6, 3, 4, 4)
        self.vq = quantiser

    def encode(self, images):
        return self.encoder(images)

    def decode(self, quantised):
        return self.decoder(quantised)


def make(codebook_size):
    return Own(QUANTISER)
"""
QUANTISERS = {
    "VectorQuantize": "VectorQuantize(dim=6, codebook_size=codebook_size, codebook_dim=4)",
    "VectorQuantize, cosine": "VectorQuantize(dim=6, codebook_size=codebook_size, use_cosine_sim=True)",
    "ResidualVQ": "ResidualVQ(dim=6, codebook_size=codebook_size, num_quantizers=3, kmeans_init=True)",
    "GroupedResidualVQ": "GroupedResidualVQ(dim=6, codebook_size=codebook_size, groups=2, num_quantizers=2)",
    "SimVQ": "SimVQ(dim=6, codebook_size=codebook_size)",
}


def lucidrains(name: str, suffix: str) -> Case:
    """A user's network file beside its checkpoint, which is one of torch.save where the suffix says so."""

    def save(folder: Path) -> Path:
        (folder / "own.py").write_text(OWN.replace("QUANTISER", QUANTISERS[name]))
        torch.manual_seed(1)
        module = make_network(f"{folder / 'own.py'}:make", 16)
        state = module.state_dict()
        for key, tensor in state.items():
            if key.endswith("_codebook.embed"):
                rows = torch.randn(tensor.shape) * 0.5
                rows[:, 10:] += 50  # far from all latents
                state[key] = normalize(rows, dim=-1) if "cosine" in name else rows
            elif key.endswith("initted"):
                state[key] = torch.ones_like(tensor)
        if suffix == ".safetensors":
            return saved(state, folder / "own.safetensors")
        torch.save({"state_dict": state, "step": 7}, folder / f"own{suffix}")
        return folder / f"own{suffix}"

    def look(result: Path, images: Tensor) -> Seen:
        state = load_file(result)
        key = next(key for key in state if key.endswith(("_codebook.embed", "frozen_codebook")))
        model: Any = make_network(f"{result.parent / 'own.py'}:make", state[key].shape[-2])
        model.load_state_dict(state, strict=True)
        for owner in (key.removesuffix("embed") for key in state if key.endswith("_codebook.embed")):
            codes, sums, counts = (state[owner + leaf] for leaf in ("embed", "embed_avg", "cluster_size"))
            assert_averages_follow(codes, sums, counts)
            assert bool(state[f"{owner}initted"].all())
        latents = model.eval().encode(images)
        quantised, indices, *_ = model.vq(latents.flatten(2).mT)
        if indices.ndim == 4:  # (groups, n, positions, stages)
            indices = indices.movedim(0, -2).flatten(-2)
        grid = latents.shape[2:]
        shown = model.decode(quantised.mT.unflatten(2, grid))
        return shown, list(indices.reshape(len(images), *grid, -1).unbind(-1))

    return Case("custom", save, look, ("_codebook.", "vq.frozen_codebook", "vq.code_transform"), "own.py:make")


# --- networks that are in no library ---------------------------------------------------------------------------------

BOOK, SHADOW = "quantize.embedding.weight", "model_ema.quantizeembeddingweight"
RECENT = "quantize.codebook_used"


def taming(dtype: torch.dtype) -> Case:
    """As latent diffusion saves it: beside its average and its loss. dtype: of all tensors."""

    def save(folder: Path) -> Path:
        state = Twin((32, 64), dim=4).state
        more = {SHADOW: state[BOOK] * 2, "loss.discriminator.main.0.weight": torch.ones(3)}
        return saved({key: tensor.to(dtype) for key, tensor in (state | more).items()}, folder / "vqgan.safetensors")

    def look(result: Path, images: Tensor) -> Seen:
        state = {key: tensor.float() for key, tensor in load_file(result).items()}
        assert torch.equal(state[SHADOW], state[BOOK])
        twin = Twin((32, 64), dim=4, state=state)
        quantised, indices = looked_up(twin.encode(images), state[BOOK])
        return twin.decode(quantised), [indices]

    return Case("taming", save, look, (BOOK, SHADOW))


def turned(state: State) -> State:
    """The decoder's levels counted the other way round, of two."""
    swap = {"decoder.up.0.": "decoder.up.1.", "decoder.up.1.": "decoder.up.0."}
    return {next((b + key[len(a) :] for a, b in swap.items() if key.startswith(a)), key): t for key, t in state.items()}


LLAMAGEN = partial(Twin, (32, 64), attended=(1,), dim=8)


def save_llamagen(folder: Path) -> Path:
    state = in_llamagen_names(turned(LLAMAGEN().state))
    state[BOOK] = normalize(state[BOOK])
    return saved(state, folder / "vq.safetensors")


def look_by_llamagens_twin(result: Path, images: Tensor) -> Seen:
    state = load_file(result)
    assert state[RECENT].shape == (65536,) and not state[RECENT].any()
    names = dict(zip(in_llamagen_names(turned(LLAMAGEN().state)), turned(LLAMAGEN().state), strict=False))
    twin = LLAMAGEN(state=turned({names[key]: tensor for key, tensor in state.items() if key != RECENT}))
    codes = state[BOOK]
    assert torch.allclose(codes.norm(dim=1), torch.ones(len(codes)))
    quantised, indices = looked_up(normalize(twin.encode(images), dim=1), codes)
    return twin.decode(quantised), [indices]


def look_by_rosinality(result: Path, images: Tensor) -> Seen:
    state = load_file(result)
    for level in ("quantize_t", "quantize_b"):
        codes, sums, counts = (state[f"{level}.{leaf}"] for leaf in ("embed", "embed_avg", "cluster_size"))
        assert_averages_follow(codes.mT, sums.mT, counts)
    return TwoLevels(state, in_place=False).forward(images.double())


def tutorial(family: str, key: str, make_state: Callable[[], State], twin: Callable[[State], Any]) -> Case:
    """A file of one codebook, ten of whose codes are latents of noise, and six lie far from all."""

    def save(folder: Path) -> Path:
        state = make_state()
        latents = twin(state).encode(torch.rand(4, 3, 16, 16, dtype=torch.float64)).movedim(1, -1).flatten(0, -2)
        codes = latents[torch.linspace(0, len(latents) - 1, 16).long()].float()
        return saved(state | {key: codes + 50 * (torch.arange(16) > 9)[:, None]}, folder / "model.safetensors")

    def look(result: Path, images: Tensor) -> Seen:
        state = load_file(result)
        reference = twin(state)
        codes, indices = reference.code(reference.encode(images.double()), state[key])
        return reference.decode(codes), [indices]

    return Case(family, save, look, (key,))


CASES = {
    "JanusVQVAE": Case("janus-vqvae", save_janus, look_by_janus, ("quantize.embedding",)),
    **{name: lucidrains(name, ".pt" if name == "ResidualVQ" else ".safetensors") for name in QUANTISERS},
    "taming": taming(torch.float32), "taming, bfloat16": taming(torch.bfloat16),
    "LlamaGen": Case("llamagen", save_llamagen, look_by_llamagens_twin, ("quantize.embedding", RECENT)),
    "rosinality": Case(
        "rosinality", lambda folder: saved(two_levels(sizes=(16, 16)), folder / "a.safetensors"), look_by_rosinality,
        ("quantize_t.", "quantize_b."),
    ),
    "PyTorch-VAE": tutorial(
        "pytorch-vae", "vq_layer.embedding.weight", lambda: pytorch_vae_state(residuals=1),
        lambda state: Leaky(state, 2, 1),
    ),
    "MishaLaskin": tutorial("mishalaskin", "vector_quantization.embedding.weight", mishalaskin_state, Shared),
}  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_what_is_written_its_own_code_loads_and_computes(
    name: str, operation: Operation, images_folder: Path, image_tensor: Tensor, tmp_path: Path
) -> None:
    case = CASES[name]
    source = case.save(tmp_path)
    network = str(tmp_path / case.network) if case.network else None
    output = tmp_path / ("result" if source.is_dir() else "result.safetensors")
    request = Request(source, (str(images_folder),), limit=30, network=network, input_range=(-1.0, 1.0), output=output)
    done, result = operated(operation, request)
    assert done.family == case.family
    if not operation.recipe.steps:
        assert_only_these_differ(result, source, case.owned)
    model = load_model(read_checkpoint(result), network=network)
    (size,) = {book.codebook.size for book in model.books}
    assert size == operation.size or (operation.size is None and size <= 16)
    with torch.no_grad():
        ours = model.pass_through(image_tensor[:4])
        shown, indices = case.look(result, image_tensor[:4] * 2 - 1)
    assert_same_indices(ours.codes, indices, size)
    assert torch.allclose(ours.media * 2 - 1, shown.float(), atol=1e-5) and shown.std() > 1e-3
