"""Tutorial networks told from shapes compute what the published code computes, written here once more, in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import State
from families import claims, described, shapes_of
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torch.nn import functional

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.models.families import mishalaskin, pytorch_vae, rosinality
from codebook_tools.models.family import Family
from codebook_tools.models.registry import family_of


def drawn(shapes: dict[str, tuple[int, ...]]) -> State:
    """Random tensors: convolutions keep the spread of what flows through them, codes and biases are small."""
    generator = torch.Generator().manual_seed(0)
    spread = {key: (2 / math.prod(shape[1:])) ** 0.5 if len(shape) == 4 else 0.3 for key, shape in shapes.items()}
    return {key: torch.randn(shape, generator=generator) * spread[key] for key, shape in shapes.items()}


def layers(rows: dict[str, tuple[int, int, int]], transposed: tuple[str, ...] = ()) -> dict[str, tuple[int, ...]]:
    """Weights and biases of convolutions, by name: (inputs, outputs, side of the kernel)."""
    shapes = {}
    for name, (inputs, outputs, side) in rows.items():
        channels = (inputs, outputs) if name in transposed else (outputs, inputs)
        shapes |= {f"{name}.weight": (*channels, side, side), f"{name}.bias": (outputs,)}
    return shapes


class Reference:
    """Convolutions as functions of a state dict. used: the keys that it looked at."""

    def __init__(self, state: State) -> None:
        self.state, self.used = {key: tensor.double() for key, tensor in state.items()}, set[str]()

    def __getitem__(self, key: str) -> Tensor | None:
        self.used.add(key)
        return self.state.get(key)

    def conv(self, x: Tensor, name: str, stride: int, padding: int) -> Tensor:
        weight = self[f"{name}.weight"]
        assert weight is not None
        return functional.conv2d(x, weight, self[f"{name}.bias"], stride, padding)

    def up(self, x: Tensor, name: str, stride: int = 2) -> Tensor:
        weight = self[f"{name}.weight"]
        assert weight is not None
        return functional.conv_transpose2d(x, weight, self[f"{name}.bias"], stride, 1)

    def code(self, x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, dim, *grid), codes (size, dim) -> the nearest codes, and their indices."""
        indices = (x.movedim(1, -1)[..., None, :] - codes.double()).square().sum(-1).argmin(-1)
        return codes.double()[indices].movedim(-1, 1), indices


def loaded(family: Family, state: State, metadata: dict[str, str] | None = None) -> Any:
    """The family's network with the weights of a state dict without prefix, in float64."""
    shapes = shapes_of(state)
    assert family.make is not None
    network = family.make(shapes, described(shapes, metadata))
    own = {name: state[family.file_key(name, shapes)] for name in network.state_dict()}
    network.load_state_dict(own)
    return network.double().eval()


def images(side: int = 16) -> Tensor:
    return torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


# --- rosinality ----------------------------------------------------------------------------------------------------


def two_levels(
    hidden: int = 8, blocks: int = 2, residual: int = 4, dim: int = 6, sizes: tuple[int, int] = (7, 11)
) -> State:
    half = hidden // 2
    rows = {
        "enc_b.blocks.0": (3, half, 4), "enc_b.blocks.2": (half, hidden, 4), "enc_b.blocks.4": (hidden, hidden, 3),
        "enc_t.blocks.0": (hidden, half, 4), "enc_t.blocks.2": (half, hidden, 3), "quantize_conv_t": (hidden, dim, 1),
        "dec_t.blocks.0": (dim, hidden, 3), f"dec_t.blocks.{blocks + 2}": (hidden, dim, 4),
        "quantize_conv_b": (dim + hidden, dim, 1), "upsample_t": (dim, dim, 4), "dec.blocks.0": (2 * dim, hidden, 3),
        f"dec.blocks.{blocks + 2}": (hidden, half, 4), f"dec.blocks.{blocks + 4}": (half, 3, 4),
    }  # fmt: skip
    for side, first in (("enc_b", 5), ("enc_t", 3), ("dec_t", 1), ("dec", 1)):
        for i in range(first, first + blocks):
            rows |= {
                f"{side}.blocks.{i}.conv.1": (hidden, residual, 3),
                f"{side}.blocks.{i}.conv.3": (residual, hidden, 1),
            }
    up = ("upsample_t", f"dec_t.blocks.{blocks + 2}", f"dec.blocks.{blocks + 2}", f"dec.blocks.{blocks + 4}")
    codebooks = {}
    for level, size in zip("tb", sizes, strict=True):
        owner = f"quantize_{level}"
        codebooks |= {
            f"{owner}.embed": (dim, size),
            f"{owner}.cluster_size": (size,),
            f"{owner}.embed_avg": (dim, size),
        }
    return drawn(layers(rows, up) | codebooks)


class TwoLevels(Reference):
    """in_place: whether the residual blocks begin with an in-place ReLU."""

    def __init__(self, state: State, in_place: bool, blocks: int = 2) -> None:
        super().__init__(state)
        self.in_place, self.blocks = in_place, blocks

    def residuals(self, x: Tensor, name: str, first: int) -> Tensor:
        for i in range(first, first + self.blocks):
            h = functional.relu(x, inplace=self.in_place)
            h = functional.relu(self.conv(h, f"{name}.blocks.{i}.conv.1", 1, 1))
            x = self.conv(h, f"{name}.blocks.{i}.conv.3", 1, 0) + x
        return functional.relu(x)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """images -> reconstruction, indices of the top and of the bottom level."""
        x = functional.relu(self.conv(x, "enc_b.blocks.0", 2, 1))
        x = functional.relu(self.conv(x, "enc_b.blocks.2", 2, 1))
        below = self.residuals(self.conv(x, "enc_b.blocks.4", 1, 1), "enc_b", 5)
        x = functional.relu(self.conv(below, "enc_t.blocks.0", 2, 1))
        above = self.residuals(self.conv(x, "enc_t.blocks.2", 1, 1), "enc_t", 3)
        top, top_indices = self.code(self.conv(above, "quantize_conv_t", 1, 0), self.state["quantize_t.embed"].T)
        x = self.residuals(self.conv(top, "dec_t.blocks.0", 1, 1), "dec_t", 1)
        x = torch.cat([self.up(x, f"dec_t.blocks.{self.blocks + 2}"), below], 1)
        bottom, bottom_indices = self.code(self.conv(x, "quantize_conv_b", 1, 0), self.state["quantize_b.embed"].T)
        x = self.conv(torch.cat([self.up(top, "upsample_t"), bottom], 1), "dec.blocks.0", 1, 1)
        x = functional.relu(self.up(self.residuals(x, "dec", 1), f"dec.blocks.{self.blocks + 2}"))
        return self.up(x, f"dec.blocks.{self.blocks + 4}"), [top_indices, bottom_indices]


def walked(network: Any, reference: Reference, pictures: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Reconstruction and indices by our network, with nearest codes and a straight-through gradient."""
    indices: list[Tensor] = []

    def quantise(stage: int, latents: Tensor) -> Tensor:
        assert stage == len(indices)
        codes, found = reference.code(latents, reference.state[network.codebooks[stage]].T)
        indices.append(found)
        return latents + (codes - latents).detach()

    return network.decode(network.walk(network.encode(pictures), quantise)), indices


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("in_place", [False, True])
def test_both_ages_of_rosinalitys_code_are_computed_as_published(in_place: bool, blocks: int) -> None:
    state = two_levels(blocks=blocks)
    family = rosinality.FAMILY_OF_2019 if in_place else rosinality.FAMILY
    reference = TwoLevels(state, in_place, blocks)
    ours, indices = walked(loaded(family, state), reference, images())
    theirs, expected = reference.forward(images())
    assert all(torch.equal(mine, its) for mine, its in zip(indices, expected, strict=True))
    assert [len(level.unique()) > 1 for level in expected] == [True, True]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    beside = {key for key in state if key.endswith((".embed", ".cluster_size", ".embed_avg"))}
    assert reference.used == set(state) - beside


def test_the_two_ages_of_rosinalitys_code_are_not_the_same() -> None:
    state = two_levels()
    now, then = (TwoLevels(state, in_place).forward(images())[0] for in_place in (False, True))
    assert (now - then).abs().max() > 1e-3


def test_rosinalitys_walk_lets_gradients_through_both_levels() -> None:
    state = two_levels()
    network = loaded(rosinality.FAMILY, state)
    out, _ = walked(network, TwoLevels(state, False), images())
    out.square().sum().backward()
    untouched = [name for name, tensor in network.named_parameters() if tensor.grad is None or not tensor.grad.any()]
    assert untouched == list(network.codebooks)


def test_rosinalitys_codebooks_lie_as_in_the_file() -> None:
    network = loaded(rosinality.FAMILY, two_levels(dim=6, sizes=(7, 11)))
    assert [tuple(network.state_dict()[key].shape) for key in network.codebooks] == [(6, 7), (6, 11)]


# --- PyTorch-VAE ---------------------------------------------------------------------------------------------------


def pytorch_vae_state(widths: tuple[int, ...] = (4, 8), residuals: int = 6, dim: int = 5) -> State:
    n, width = len(widths), widths[-1]
    rows = {f"encoder.{i}.0": (w, v, 4) for i, (w, v) in enumerate(zip((3, *widths), widths, strict=False))}
    rows |= {f"encoder.{n}.0": (width, width, 3), f"encoder.{n + residuals + 2}.0": (width, dim, 1)}
    rows |= {"decoder.0.0": (dim, width, 3)}
    outputs = (*widths[-2::-1], 3)
    ups = {
        f"decoder.{residuals + 2 + i}.0": (w, v, 4)
        for i, (w, v) in enumerate(zip((width, *outputs), outputs, strict=False))
    }
    shapes = layers(rows | ups, tuple(ups))
    for side, first in (("encoder", n + 1), ("decoder", 1)):
        for i in range(first, first + residuals):
            shapes |= {
                f"{side}.{i}.resblock.0.weight": (width, width, 3, 3),
                f"{side}.{i}.resblock.2.weight": (width, width, 1, 1),
            }
    return drawn(shapes | {"vq_layer.embedding.weight": (9, dim)})


class Leaky(Reference):
    """PyTorch-VAE's network. widths, residuals: as its state was made with."""

    def __init__(self, state: State, halvings: int, residuals: int) -> None:
        super().__init__(state)
        self.halvings, self.residuals = halvings, residuals

    def stack(self, x: Tensor, side: str, first: int) -> Tensor:
        for i in range(first, first + self.residuals):
            h = functional.relu(self.conv(x, f"{side}.{i}.resblock.0", 1, 1))
            x = x + self.conv(h, f"{side}.{i}.resblock.2", 1, 0)
        return functional.leaky_relu(x)

    def encode(self, x: Tensor) -> Tensor:
        for i in range(self.halvings):
            x = functional.leaky_relu(self.conv(x, f"encoder.{i}.0", 2, 1))
        x = functional.leaky_relu(self.conv(x, f"encoder.{self.halvings}.0", 1, 1))
        x = self.stack(x, "encoder", self.halvings + 1)
        return functional.leaky_relu(self.conv(x, f"encoder.{self.halvings + self.residuals + 2}.0", 1, 0))

    def decode(self, x: Tensor) -> Tensor:
        x = self.stack(functional.leaky_relu(self.conv(x, "decoder.0.0", 1, 1)), "decoder", 1)
        for i in range(self.halvings):
            x = self.up(x, f"decoder.{self.residuals + 2 + i}.0")
            x = functional.leaky_relu(x) if i < self.halvings - 1 else x.tanh()
        return x


@pytest.mark.parametrize(("widths", "residuals"), [((4, 8), 6), ((8,), 1), ((4, 8, 12), 2)])
def test_pytorch_vaes_network_is_computed_as_published(widths: tuple[int, ...], residuals: int) -> None:
    state = pytorch_vae_state(widths, residuals)
    network, reference = loaded(pytorch_vae.FAMILY, state), Leaky(state, len(widths), residuals)
    latents = network.encode(images())
    torch.testing.assert_close(latents, reference.encode(images()), rtol=0, atol=1e-12)
    torch.testing.assert_close(network.decode(latents * 9), reference.decode(latents * 9), rtol=0, atol=1e-12)
    biases = {key for key in reference.used if key.endswith("bias")}
    assert reference.used - biases | (biases & set(state)) == set(state) - {pytorch_vae.CODEBOOK}


# --- MishaLaskin ---------------------------------------------------------------------------------------------------


def mishalaskin_state(hidden: int = 8, residual: int = 4, depth: int = 3, dim: int = 8) -> State:
    half = hidden // 2
    rows = {
        "encoder.conv_stack.0": (3, half, 4), "encoder.conv_stack.2": (half, hidden, 4),
        "encoder.conv_stack.4": (hidden, hidden, 3), "pre_quantization_conv": (hidden, dim, 1),
        "decoder.inverse_conv_stack.0": (dim, hidden, 3), "decoder.inverse_conv_stack.2": (hidden, half, 4),
        "decoder.inverse_conv_stack.4": (half, 3, 4),
    }  # fmt: skip
    stacks = ("encoder.conv_stack.5.stack", "decoder.inverse_conv_stack.1.stack")
    blocks = {f"{stack}.0.res_block.1.weight": (residual, hidden, 3, 3) for stack in stacks}
    blocks |= {f"{stack}.0.res_block.3.weight": (hidden, residual, 1, 1) for stack in stacks}
    state = drawn(layers(rows, tuple(rows)[4:]) | blocks | {"vector_quantization.embedding.weight": (9, dim)})
    repeated = {key.replace(".stack.0.", f".stack.{i}."): state[key] for key in blocks for i in range(1, depth)}
    return state | repeated


class Shared(Reference):
    """MishaLaskin's network; its first ReLU of a block works in place."""

    def stack(self, x: Tensor, name: str) -> Tensor:
        for i in range(sum(key.startswith(name) for key in self.state) // 2):
            h = functional.relu(x, inplace=True)
            h = functional.relu(self.conv(h, f"{name}.{i}.res_block.1", 1, 1))
            x = x + self.conv(h, f"{name}.{i}.res_block.3", 1, 0)
        return functional.relu(x)

    def encode(self, x: Tensor) -> Tensor:
        x = functional.relu(self.conv(x, "encoder.conv_stack.0", 2, 1))
        x = self.conv(functional.relu(self.conv(x, "encoder.conv_stack.2", 2, 1)), "encoder.conv_stack.4", 1, 1)
        return self.conv(self.stack(x, "encoder.conv_stack.5.stack"), "pre_quantization_conv", 1, 0)

    def decode(self, x: Tensor) -> Tensor:
        x = self.stack(self.up(x, "decoder.inverse_conv_stack.0", 1), "decoder.inverse_conv_stack.1.stack")
        return self.up(functional.relu(self.up(x, "decoder.inverse_conv_stack.2")), "decoder.inverse_conv_stack.4")


def assert_as_published(network: Any, state: State) -> None:
    reference = Shared(state)
    latents = network.encode(images())
    torch.testing.assert_close(latents, reference.encode(images()), rtol=0, atol=1e-12)
    torch.testing.assert_close(network.decode(latents), reference.decode(latents), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("depth", "dim"), [(1, 5), (2, 8), (3, 8)])
def test_mishalaskins_network_is_computed_as_published(depth: int, dim: int) -> None:
    state = mishalaskin_state(depth=depth, dim=dim)
    network = loaded(mishalaskin.FAMILY, state)
    assert_as_published(network, state)
    shapes = shapes_of(state)
    assert {mishalaskin.file_key(name, shapes) for name in network.state_dict()} == set(shapes)


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
    save_model(holder, str(tmp_path / "model.safetensors"))
    checkpoint = read_checkpoint(tmp_path / "model.safetensors")
    assert len(checkpoint.shapes) == len(state) - 8
    assert mishalaskin.FAMILY.prefix(checkpoint) == ""
    assert_as_published(loaded(mishalaskin.FAMILY, checkpoint.tensors(), checkpoint.metadata), state)


# --- recognition ---------------------------------------------------------------------------------------------------

STATES = {"rosinality": two_levels, "pytorch-vae": pytorch_vae_state, "mishalaskin": mishalaskin_state}


@pytest.mark.parametrize("prefix", ["", "module.", "model.vqvae."])
@pytest.mark.parametrize("name", STATES)
def test_a_family_knows_its_own_layout_and_no_other_does(name: str, prefix: str) -> None:
    shapes = {prefix + key: shape for key, shape in shapes_of(STATES[name]()).items()}
    others = {"epoch": (), "discriminator.blocks.0.weight": (8, 3, 4, 4)}
    assert claims(described(shapes | others)) == {name: prefix}


ODD = {
    "a layer that is not published": ("rosinality", {"enc_b.blocks.6.attention.weight": (8, 8, 1, 1)}),
    "one level more": ("rosinality", {"enc_t.blocks.0.weight": (4, 8, 3, 3)}),
    "a top of stride 4": ("rosinality", {"enc_t.blocks.2.weight": (8, 4, 4, 4)}),
    "no codebook below": ("rosinality", {"quantize_b.embed": None}),
    "upsampled by interpolation": ("pytorch-vae", {"decoder.9.0.weight": None, "decoder.9.1.weight": (3, 4, 3, 3)}),
    "another number of doublings": ("pytorch-vae", {"decoder.8.0.weight": (8, 4, 3, 3)}),
    "a norm": ("pytorch-vae", {"encoder.0.1.weight": (4,)}),
    "a larger kernel": ("mishalaskin", {"encoder.conv_stack.4.weight": (8, 8, 5, 5)}),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_network_that_is_only_nearly_so_is_not_claimed(odd: str) -> None:
    name, changes = ODD[odd]
    shapes: dict[str, Any] = {**shapes_of(STATES[name]()), **changes}
    assert claims(described({key: shape for key, shape in shapes.items() if shape is not None})) == {}


def test_networks_are_told_from_a_file_as_well(tmp_path: Path) -> None:
    for name, make in STATES.items():
        state = {f"model.{key}": tensor.clone() for key, tensor in make().items()}
        save_file(state, tmp_path / "a.safetensors")
        checkpoint = read_checkpoint(tmp_path / "a.safetensors")
        assert claims(checkpoint) == {name: "model."} and family_of(checkpoint) == name
