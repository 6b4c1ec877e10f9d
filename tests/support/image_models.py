"""Image tokenizers of 16 codes, of which some are dead, as their own code saves them; and what that makes of images."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conftest import State
from points import looked_up, with_dead_codes
from round_trips import assert_averages_follow, assert_loads_whole
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from tutorial_networks import Leaky, Shared, TwoLevels, mishalaskin_state, pytorch_vae_state, two_levels
from vqgan_twin import Twin

from codebook_tools.models.user_network import make_network

BOOK = "quantize.embedding.weight"

Computed = tuple[Tensor, list[Tensor]]
"""Images in the network's range, and indices (n, height, width) of every stage."""


@dataclass(frozen=True)
class Case:
    """save: writes a model of 16 codes to a folder, and returns its path. compute: result, images in [-1, 1] -> what
    the model's own code, or an independent twin, makes of them. owned: parts of the names of what follows the codes."""

    family: str
    save: Callable[[Path], Path]
    compute: Callable[[Path, Tensor], Computed]
    owned: tuple[str, ...]
    network: str = ""


def write(state: State, path: Path) -> Path:
    contiguous = {key: tensor.clone().contiguous() for key, tensor in state.items()}
    save_file(contiguous, path, {"format": "pt", "note": "by others"})
    return path


# --- libraries -------------------------------------------------------------------------------------------------------


def vqmodel(images: Tensor, **config: Any) -> Any:
    """A VQModel of diffusers, of stride 2. images: (n, 3, height, width) in [0, 1], some of whose latents are codes."""
    from diffusers import VQModel

    width = 32 if config.get("norm_type") == "spatial" else 8  # its norms have 32 groups, whatever the config says
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VQModel(
            block_out_channels=(width, width),
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            norm_num_groups=4,
            num_vq_embeddings=16,
            **({"latent_channels": 4} | config),
        ).eval()
    with torch.no_grad():
        latents = model.encode(images * 2 - 1).latents.movedim(1, -1).flatten(0, -2)
        model.quantize.embedding.weight.copy_(with_dead_codes(latents))
    return model


def save_vqmodel(folder: Path, **config: Any) -> Path:
    images = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    vqmodel(images, **config).save_pretrained(folder / "vae")
    return folder / "vae"


def by_vqmodel(result: Path, images: Tensor) -> Computed:
    from diffusers import VQModel

    model, info = VQModel.from_pretrained(result, output_loading_info=True)
    assert_loads_whole({"mismatched_keys": [], "error_msgs": []} | info)
    assert model.config.num_vq_embeddings == len(model.quantize.embedding.weight)
    latents = model.eval().encode(images).latents
    _, _, (_, _, codes) = model.quantize(latents)
    return model.decode(latents).sample, [codes.reshape(len(images), *latents.shape[2:])]


def janus() -> Any:
    """A JanusVQVAE of stride 4 with weights large enough to matter, and codes of unit length."""
    from transformers import JanusVQVAE, JanusVQVAEConfig

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
        model.quantize.embedding.weight.copy_(normalize(model.quantize.embedding.weight))
    return model


def save_janus(folder: Path) -> Path:
    janus().save_pretrained(folder / "janus")
    return folder / "janus"


def by_janus(result: Path, images: Tensor) -> Computed:
    from transformers import JanusVQVAE

    model, info = JanusVQVAE.from_pretrained(result, output_loading_info=True)
    assert_loads_whole(info)
    rows = model.quantize.embedding.weight
    assert model.config.num_embeddings == len(rows) and torch.allclose(rows.norm(dim=1), torch.ones(len(rows)))
    _, _, tokens = model.eval().quantize(model.quant_conv(model.encoder(images)))
    return model.decode(tokens.reshape(len(images), -1)), [tokens.reshape(len(images), 4, 4)]


OWN = """
from torch import nn
from vector_quantize_pytorch import GroupedResidualVQ, ResidualVQ, SimVQ, VectorQuantize


class Own(nn.Module):
    def __init__(self, quantizer):
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, 6, 4, 4), nn.ConvTranspose2d(6, 3, 4, 4)
        self.vq = quantizer

    def encode(self, images):
        return self.encoder(images)

    def decode(self, quantized):
        return self.decoder(quantized)


def make(codebook_size):
    return Own(QUANTIZER)
"""
QUANTIZERS = {
    "VectorQuantize": "VectorQuantize(dim=6, codebook_size=codebook_size, codebook_dim=4)",
    "VectorQuantize, cosine": "VectorQuantize(dim=6, codebook_size=codebook_size, use_cosine_sim=True)",
    "ResidualVQ": "ResidualVQ(dim=6, codebook_size=codebook_size, num_quantizers=3, kmeans_init=True)",
    "GroupedResidualVQ": "GroupedResidualVQ(dim=6, codebook_size=codebook_size, groups=2, num_quantizers=2)",
    "SimVQ": "SimVQ(dim=6, codebook_size=codebook_size)",
}


def lucidrains(name: str, suffix: str) -> Case:
    """A user's network file beside its checkpoint, which is one of torch.save where the suffix says so."""

    def save(folder: Path) -> Path:
        (folder / "own.py").write_text(OWN.replace("QUANTIZER", QUANTIZERS[name]))
        torch.manual_seed(1)
        state = make_network(f"{folder / 'own.py'}:make", 16).state_dict()
        for key, tensor in state.items():
            if key.endswith("_codebook.embed"):
                rows = torch.randn(tensor.shape) * 0.5
                rows[:, 10:] += 50  # far from all latents
                state[key] = normalize(rows, dim=-1) if "cosine" in name else rows
            elif key.endswith("initted"):
                state[key] = torch.ones_like(tensor)
        if suffix == ".safetensors":
            return write(state, folder / "own.safetensors")
        torch.save({"state_dict": state, "step": 7}, folder / f"own{suffix}")
        return folder / f"own{suffix}"

    def compute(result: Path, images: Tensor) -> Computed:
        state = load_file(result)
        key = next(key for key in state if key.endswith(("_codebook.embed", "frozen_codebook")))
        model: Any = make_network(f"{result.parent / 'own.py'}:make", state[key].shape[-2])
        model.load_state_dict(state, strict=True)
        for owner in (key.removesuffix("embed") for key in state if key.endswith("_codebook.embed")):
            codes, sums, counts = (state[owner + leaf] for leaf in ("embed", "embed_avg", "cluster_size"))
            assert_averages_follow(codes, sums, counts)
            assert bool(state[f"{owner}initted"].all())
        latents = model.eval().encode(images)
        quantized, indices, *_ = model.vq(latents.flatten(2).mT)
        if indices.ndim == 4:  # (groups, n, positions, stages)
            indices = indices.movedim(0, -2).flatten(-2)
        grid = latents.shape[2:]
        decoded = model.decode(quantized.mT.unflatten(2, grid))
        return decoded, list(indices.reshape(len(images), *grid, -1).unbind(-1))

    return Case("custom", save, compute, ("_codebook.", "vq.frozen_codebook", "vq.code_transform"), "own.py:make")


# --- networks that are in no library ---------------------------------------------------------------------------------

SHADOW, RECENT = "model_ema.quantizeembeddingweight", "quantize.codebook_used"


def taming(dtype: torch.dtype) -> Case:
    """As latent diffusion saves it: beside its average and its loss. dtype: of all tensors."""

    def save(folder: Path) -> Path:
        state = Twin((32, 64), dim=4).state
        more = {SHADOW: state[BOOK] * 2, "loss.discriminator.main.0.weight": torch.ones(3)}
        return write({key: tensor.to(dtype) for key, tensor in (state | more).items()}, folder / "vqgan.safetensors")

    def compute(result: Path, images: Tensor) -> Computed:
        state = {key: tensor.float() for key, tensor in load_file(result).items()}
        assert torch.equal(state[SHADOW], state[BOOK])
        twin = Twin((32, 64), dim=4, state=state)
        quantized, indices = looked_up(twin.encode(images), state[BOOK])
        return twin.decode(quantized), [indices]

    return Case("taming", save, compute, (BOOK, SHADOW))


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
    """A JanusVQVAE's state under LlamaGen's names."""
    renamed = dict(state)
    for theirs, own in RENAMED:
        renamed = {re.sub(theirs, own, key): tensor for key, tensor in renamed.items()}
    recent = torch.arange(65536) % 16  # indices of the codes used last, not rows
    return {f"{prefix}{key}": tensor for key, tensor in (renamed | {RECENT: recent.float()}).items()}


def turned(state: State) -> State:
    """A twin's state with the decoder's levels counted the other way round."""
    last = max(int(level) for key in state for level in re.findall(r"^decoder\.up\.(\d)", key))
    return {re.sub(r"(?<=^decoder\.up\.)\d", lambda i: str(last - int(i[0])), key): t for key, t in state.items()}


LLAMAGEN = partial(Twin, (32, 64), attended=(1,), dim=8)


def save_llamagen(folder: Path) -> Path:
    state = in_llamagen_names(turned(LLAMAGEN().state))
    state[BOOK] = normalize(state[BOOK])
    return write(state, folder / "vq.safetensors")


def by_llamagens_twin(result: Path, images: Tensor) -> Computed:
    state = load_file(result)
    assert state[RECENT].shape == (65536,) and not state[RECENT].any()
    names = dict(zip(in_llamagen_names(turned(LLAMAGEN().state)), turned(LLAMAGEN().state), strict=False))
    twin = LLAMAGEN(state=turned({names[key]: tensor for key, tensor in state.items() if key != RECENT}))
    codes = state[BOOK]
    assert torch.allclose(codes.norm(dim=1), torch.ones(len(codes)))
    quantized, indices = looked_up(normalize(twin.encode(images), dim=1), codes)
    return twin.decode(quantized), [indices]


def by_rosinality(result: Path, images: Tensor) -> Computed:
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
        return write(state | {key: codes + 50 * (torch.arange(16) > 9)[:, None]}, folder / "model.safetensors")

    def compute(result: Path, images: Tensor) -> Computed:
        state = load_file(result)
        reference = twin(state)
        codes, indices = reference.code(reference.encode(images.double()), state[key].double())
        return reference.decode(codes), [indices]

    return Case(family, save, compute, (key,))


CASES = {
    "VQModel": Case("diffusers-vqmodel", save_vqmodel, by_vqmodel, (BOOK,)),
    "MoVQ": Case("diffusers-vqmodel", partial(save_vqmodel, norm_type="spatial"), by_vqmodel, (BOOK,)),
    "JanusVQVAE": Case("janus-vqvae", save_janus, by_janus, ("quantize.embedding",)),
    **{name: lucidrains(name, ".pt" if name == "ResidualVQ" else ".safetensors") for name in QUANTIZERS},
    "taming": taming(torch.float32), "taming, bfloat16": taming(torch.bfloat16),
    "LlamaGen": Case("llamagen", save_llamagen, by_llamagens_twin, ("quantize.embedding", RECENT)),
    "rosinality": Case(
        "rosinality", lambda folder: write(two_levels(sizes=(16, 16)), folder / "a.safetensors"), by_rosinality,
        ("quantize_t.", "quantize_b."),
    ),
    "PyTorch-VAE": tutorial(
        "pytorch-vae", "vq_layer.embedding.weight", lambda: pytorch_vae_state(residuals=1),
        lambda state: Leaky(state, 2, 1),
    ),
    "MishaLaskin": tutorial("mishalaskin", "vector_quantization.embedding.weight", mishalaskin_state, Shared),
}  # fmt: skip
