"""VQGANs in taming's names are run by diffusers, and compute what their own code would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import State
from families import assert_close, described, loaded, pictures, shapes_of
from safetensors.torch import save_file
from vqgan_twin import Twin

from codebook_tools.errors import CodebookError
from codebook_tools.models.families.diffusers_vqmodel import CODEBOOK
from codebook_tools.models.families.taming import FAMILY


def saved(state: State, path: Path, prefix: str = "", more: State | None = None) -> Path:
    save_file({f"{prefix}{key}": tensor for key, tensor in state.items()} | (more or {}), path, {"format": "pt"})
    return path


# As in published configs, with fewer channels: f4 without attention; f8 and f16 with it at the coarsest level; without
# any, not even in the middle (vq-f4-noattn); MoVQ.
TWINS: dict[str, Callable[[], Twin]] = {
    "f4": lambda: Twin((32, 64, 128), depth=2, latent=3, dim=3),
    "f8": lambda: Twin((32, 64, 64, 128), attended=(3,)),
    "noattn": lambda: Twin((32, 64), middle=False),
    "attention halfway": lambda: Twin((32, 64, 32), depth=2, attended=(1,)),
    "attention first": lambda: Twin((32, 32), attended=(0,)),
    "latent is not dim": lambda: Twin((32, 64), latent=8, dim=5),
    "grey to RGB": lambda: Twin((32, 64), channels=(1, 3)),
    "one level": lambda: Twin((32,), attended=(0,)),
    "movq": lambda: Twin((32, 64, 64), depth=2, attended=(2,), movq=True),
    "movq without attention": lambda: Twin((32, 64), movq=True),
}


@pytest.mark.parametrize("kind", TWINS)
def test_it_computes_what_an_independent_twin_does(kind: str, tmp_path: Path) -> None:
    twin = TWINS[kind]()
    network = loaded(FAMILY, saved(twin.state, tmp_path / "vqgan.safetensors"))
    images = pictures(twin.channels[0])
    with torch.no_grad():
        latents = twin.encode(images)
        assert_close(network.encode(images), latents)
        codes = twin.state[CODEBOOK][torch.arange(latents[:, 0].numel()) % 16]
        quantised = codes.reshape(len(latents), *latents.shape[2:], twin.dim).movedim(-1, 1)
        assert_close(network.decode(quantised), twin.decode(quantised))
    assert sum(tensor.numel() for tensor in network.state_dict().values()) == sum(
        t.numel() for t in twin.state.values()
    )


@pytest.mark.parametrize("prefix", ["first_stage_model.", "model.", "module.first_stage_model."])
def test_it_is_found_inside_a_larger_model(prefix: str, tmp_path: Path) -> None:
    twin = Twin()
    others = {"loss.discriminator.main.0.weight": torch.ones(3), "model_ema.decay": torch.tensor(0.5)}
    path = saved(
        twin.state, tmp_path / "ldm.safetensors", prefix, others | {"loss.perceptual.net.0.weight": torch.ones(1)}
    )
    with torch.no_grad():
        assert_close(loaded(FAMILY, path).encode(pictures()), twin.encode(pictures()))


def test_a_copy_beside_it_is_not_taken_for_it(tmp_path: Path) -> None:
    twin = Twin()
    average = {f"a_ema_model.{key}": tensor * 0.5 for key, tensor in twin.state.items()}
    path = saved(twin.state, tmp_path / "vqgan.safetensors", "z_model.", average)
    with torch.no_grad():
        assert_close(loaded(FAMILY, path).encode(pictures()), twin.encode(pictures()))


def test_gradients_reach_every_layer(tmp_path: Path) -> None:
    network = loaded(FAMILY, saved(Twin(attended=(1,)).state, tmp_path / "vqgan.safetensors"))
    network.decode(network.encode(pictures())).square().mean().backward()
    still = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert still == [f"model.{CODEBOOK}"]


def without(state: State, part: str) -> State:
    return {key: tensor for key, tensor in state.items() if part not in key}


REFUSED: dict[str, tuple[Callable[[], State], str]] = {
    "attention after one of two blocks": (
        lambda: without(Twin(depth=2, attended=(1,)).state, "encoder.down.1.attn.1"), "encoder.down.1.attn.1",
    ),
    "attention that only a later block has": (
        lambda: without(Twin(depth=2, attended=(1,)).state, "encoder.down.1.attn.0"), "encoder.down.1.attn.1",
    ),
    "a first level of other channels than its input": (
        lambda: Twin().state | {"encoder.conv_in.weight": torch.ones(64, 3, 3, 3)},
        "encoder.conv_in.weight would be (32, 3, 3, 3), not (64, 3, 3, 3)",
    ),
    "a block more in one level": (
        lambda: Twin().state | {"encoder.down.1.block.1.conv1.weight": torch.ones(64, 64, 3, 3)},
        "encoder.down.1.block.1.conv1.weight would be missing, not (64, 64, 3, 3)",
    ),
    "downsampling without a layer": (
        lambda: without(Twin().state, "downsample"), "encoder.down.0.downsample.conv.weight and 1 more would be (32",
    ),
    "a shortcut of 3x3": (
        lambda: without(Twin().state, "down.1.block.0.nin_shortcut")
        | {"encoder.down.1.block.0.conv_shortcut.weight": torch.ones(64, 32, 3, 3)},
        "encoder.down.1.block.0.conv_shortcut.weight",
    ),
    "norms of fewer groups": (lambda: narrowed(Twin().state), "must be divisible by num_groups"),
}  # fmt: skip


def narrowed(state: State) -> State:
    """Every axis of 32 channels cut to 24, of 64 to 48."""
    cut = {32: slice(24), 64: slice(48)}
    return {key: tensor[tuple(cut.get(n, slice(None)) for n in tensor.shape)] for key, tensor in state.items()}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_diffusers_cannot_build_is_refused_in_one_line(kind: str) -> None:
    change, message = REFUSED[kind]
    checkpoint = described(shapes_of(change()))
    assert FAMILY.prefix(checkpoint) == "" and FAMILY.make is not None
    with pytest.raises(CodebookError) as refused:
        FAMILY.make(checkpoint.shapes, checkpoint)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "other", ["quantize.embedding_proj.weight", "quantize.embed_prob", "quantize.ema_vocab_hit_SV", "quantize.used"]
)
def test_a_quantiser_that_uses_its_rows_in_another_way_is_left_alone(other: str) -> None:
    shapes = shapes_of(Twin().state)
    assert FAMILY.prefix(described(shapes)) == ""
    assert FAMILY.prefix(described(shapes | {"quantize.embedding.cluster_size": (16,)})) == ""
    assert FAMILY.prefix(described(shapes | {other: (16, 4)})) is None
