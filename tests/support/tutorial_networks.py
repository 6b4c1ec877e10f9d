"""Networks of tutorials once more, without the package: random state dicts, and what their published code computes."""

from __future__ import annotations

import math

import torch
from conftest import State
from points import looked_up
from torch import Tensor
from torch.nn import functional


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

    code = staticmethod(looked_up)

    def __init__(self, state: State) -> None:
        self.state, self.used = {key: tensor.double() for key, tensor in state.items()}, set[str]()

    def __getitem__(self, key: str) -> Tensor | None:
        self.used.add(key)
        return self.state.get(key)

    def weight(self, name: str) -> Tensor:
        weight = self[f"{name}.weight"]
        assert weight is not None
        return weight

    def conv(self, x: Tensor, name: str, stride: int = 1, padding: int = 0) -> Tensor:
        return functional.conv2d(x, self.weight(name), self[f"{name}.bias"], stride, padding)

    def up(self, x: Tensor, name: str, stride: int = 2) -> Tensor:
        return functional.conv_transpose2d(x, self.weight(name), self[f"{name}.bias"], stride, 1)


def two_levels(hidden: int = 8, blocks: int = 2, dim: int = 6, sizes: tuple[int, int] = (7, 11)) -> State:
    half = residual = hidden // 2
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
        top, top_indices = self.code(self.conv(above, "quantize_conv_t"), self.state["quantize_t.embed"].T)
        x = self.residuals(self.conv(top, "dec_t.blocks.0", 1, 1), "dec_t", 1)
        x = torch.cat([self.up(x, f"dec_t.blocks.{self.blocks + 2}"), below], 1)
        bottom, bottom_indices = self.code(self.conv(x, "quantize_conv_b"), self.state["quantize_b.embed"].T)
        x = self.conv(torch.cat([self.up(top, "upsample_t"), bottom], 1), "dec.blocks.0", 1, 1)
        x = functional.relu(self.up(self.residuals(x, "dec", 1), f"dec.blocks.{self.blocks + 2}"))
        return self.up(x, f"dec.blocks.{self.blocks + 4}"), [top_indices, bottom_indices]


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


class Tutorial(Reference):
    """The zalando tutorial's forward pass; its ReLU works in place, as its blocks do.

    in_place: False for the reading that its code suggests at first sight, in which a skip carries x and not relu(x).
    """

    def __init__(self, state: State, in_place: bool = True) -> None:
        super().__init__({key.removeprefix("module."): tensor for key, tensor in state.items()})
        self.in_place = in_place

    def weight(self, name: str) -> Tensor:
        for length, direction in (
            (f"{name}.weight_g", f"{name}.weight_v"),
            (f"{name}.parametrizations.weight.original0", f"{name}.parametrizations.weight.original1"),
        ):
            if (v := self[direction]) is not None:
                return self.state[length] * v / v.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        return super().weight(name)

    def residuals(self, x: Tensor, name: str) -> Tensor:
        for i in range(2):
            h = functional.relu(x, inplace=self.in_place)
            h = functional.relu(self.conv(h, f"{name}._layers.{i}._block.1", padding=1))
            x = x + self.conv(h, f"{name}._layers.{i}._block.3")
        return functional.relu(x)

    def encode(self, x: Tensor) -> Tensor:
        x = functional.relu(self.conv(x.double(), "_encoder._conv_1", 2, 1))
        x = functional.relu(self.conv(x, "_encoder._conv_2", 2, 1))
        x = self.residuals(self.conv(x, "_encoder._conv_3", 1, 1), "_encoder._residual_stack")
        return self.conv(x, "_pre_vq_conv")

    def decode(self, x: Tensor) -> Tensor:
        x = self.residuals(self.conv(x.double(), "_decoder._conv_1", 1, 1), "_decoder._residual_stack")
        return self.up(functional.relu(self.up(x, "_decoder._conv_trans_1")), "_decoder._conv_trans_2")
