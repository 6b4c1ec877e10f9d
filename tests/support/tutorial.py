"""The zalando tutorial's network once more, without the package: what its own must agree with."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


class Tutorial:
    """The tutorial's forward pass as plain functions of a state dict; its ReLU works in place, as its blocks do.

    in_place: False for the reading that its code suggests at first sight, in which a skip carries x and not relu(x).
    """

    def __init__(self, state: dict[str, Tensor], in_place: bool = True) -> None:
        self.state = {key.removeprefix("module."): tensor.double() for key, tensor in state.items()}
        self.in_place = in_place

    def weight(self, name: str) -> Tensor:
        for length, direction in (
            (f"{name}.weight_g", f"{name}.weight_v"),
            (f"{name}.parametrizations.weight.original0", f"{name}.parametrizations.weight.original1"),
        ):
            if direction in self.state:
                v = self.state[direction]
                return self.state[length] * v / v.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        return self.state[f"{name}.weight"]

    def conv(self, x: Tensor, name: str, stride: int = 1, padding: int = 0) -> Tensor:
        return functional.conv2d(x, self.weight(name), self.state.get(f"{name}.bias"), stride, padding)

    def transposed(self, x: Tensor, name: str) -> Tensor:
        return functional.conv_transpose2d(x, self.weight(name), self.state.get(f"{name}.bias"), 2, 1)

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
        return self.transposed(functional.relu(self.transposed(x, "_decoder._conv_trans_1")), "_decoder._conv_trans_2")
