"""The network of the zalando tutorial (zalandoresearch/pytorch-vq-vae) and its many copies, told from the shapes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional

from codebook_tools.errors import CodebookError

CODEBOOK = "_vq_vae._embedding.weight"

Shapes = Mapping[str, tuple[int, ...]]


class Residual(nn.Module):
    """relu(x) + block(relu(x)): the tutorial's blocks begin with an in-place ReLU, so its skip path carries relu(x)."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self._block = nn.Sequential(
            nn.Identity(), _conv(shapes, f"{name}._block.1", padding=1), nn.ReLU(), _conv(shapes, f"{name}._block.3")
        )

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(x)
        changed: Tensor = self._block(x)
        return x + changed


class ResidualStack(nn.Module):
    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        depth = len({key.split(".")[len(name.split(".")) + 1] for key in shapes if key.startswith(f"{name}._layers.")})
        self._layers = nn.ModuleList(Residual(shapes, f"{name}._layers.{i}") for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._layers:
            x = layer(x)
        return functional.relu(x)


class Encoder(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self._conv_1 = _conv(shapes, "_encoder._conv_1", stride=2, padding=1)
        self._conv_2 = _conv(shapes, "_encoder._conv_2", stride=2, padding=1)
        self._conv_3 = _conv(shapes, "_encoder._conv_3", padding=1)
        self._residual_stack = ResidualStack(shapes, "_encoder._residual_stack")

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self._conv_1(x))
        x = functional.relu(self._conv_2(x))
        out: Tensor = self._residual_stack(self._conv_3(x))
        return out


class Decoder(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self._conv_1 = _conv(shapes, "_decoder._conv_1", padding=1)
        self._residual_stack = ResidualStack(shapes, "_decoder._residual_stack")
        self._conv_trans_1 = _conv(shapes, "_decoder._conv_trans_1", stride=2, padding=1, transposed=True)
        self._conv_trans_2 = _conv(shapes, "_decoder._conv_trans_2", stride=2, padding=1, transposed=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self._residual_stack(self._conv_1(x))
        x = functional.relu(self._conv_trans_1(x))
        out: Tensor = self._conv_trans_2(x)
        return out


class ZalandoVQVAE(nn.Module):
    """shapes: by key, of a checkpoint in this layout; they give channels, depth, biases and weight normalisation."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self._encoder = Encoder(shapes)
        self._pre_vq_conv = _conv(shapes, "_pre_vq_conv")
        self._vq_vae = nn.Module()
        size, dim = shapes[CODEBOOK]
        self._vq_vae._embedding = nn.Embedding(size, dim)
        self._decoder = Decoder(shapes)

    def encode(self, images: Tensor) -> Tensor:
        """images (n, channels, height, width) in the model's range -> latents (n, dim, height/4, width/4)."""
        latents: Tensor = self._pre_vq_conv(self._encoder(images))
        return latents

    def decode(self, quantised: Tensor) -> Tensor:
        """quantised (n, dim, height/4, width/4) -> images (n, channels, height, width)."""
        images: Tensor = self._decoder(quantised)
        return images


def make(
    codebook_size: int = 512, channels: int = 3, hidden: int = 128, residual: int = 32, depth: int = 2, dim: int = 64
) -> ZalandoVQVAE:
    """A fresh network with the tutorial's own initialisation, codebook at U(-1/K, 1/K)."""
    shapes: dict[str, tuple[int, ...]] = {
        "_encoder._conv_1": (hidden // 2, channels, 4, 4),
        "_encoder._conv_2": (hidden, hidden // 2, 4, 4),
        "_encoder._conv_3": (hidden, hidden, 3, 3),
        "_pre_vq_conv": (dim, hidden, 1, 1),
        "_decoder._conv_1": (hidden, dim, 3, 3),
        "_decoder._conv_trans_1": (hidden, hidden // 2, 4, 4),
        "_decoder._conv_trans_2": (hidden // 2, channels, 4, 4),
    }
    biases = {f"{name}.bias": (shape[1 if "trans" in name else 0],) for name, shape in shapes.items()}
    for side in ("_encoder", "_decoder"):
        for i in range(depth):
            shapes[f"{side}._residual_stack._layers.{i}._block.1"] = (residual, hidden, 3, 3)
            shapes[f"{side}._residual_stack._layers.{i}._block.3"] = (hidden, residual, 1, 1)
    weights = {f"{name}.weight": shape for name, shape in shapes.items()}
    network = ZalandoVQVAE({**weights, **biases, CODEBOOK: (codebook_size, dim)})
    embedding = network._vq_vae._embedding
    assert isinstance(embedding, nn.Embedding)
    nn.init.uniform_(embedding.weight, -1 / codebook_size, 1 / codebook_size)
    return network


def prefix_of(shapes: Shapes) -> str | None:
    """What stands before the layout's own key names ("", "module.", ...); None where this is another layout."""
    key = next((key for key in shapes if key == CODEBOOK or key.endswith("." + CODEBOOK)), None)
    if key is None:
        return None
    prefix = key.removesuffix(CODEBOOK)
    kernels = {"_encoder._conv_1": 4, "_encoder._conv_2": 4, "_encoder._conv_3": 3, "_pre_vq_conv": 1,
               "_decoder._conv_1": 3, "_decoder._conv_trans_1": 4, "_decoder._conv_trans_2": 4}  # fmt: skip
    found = {name: _weight_shape(shapes, prefix + name) for name in kernels}
    fits = all(shape is not None and shape[2:] == (kernels[name],) * 2 for name, shape in found.items())
    return prefix if fits else None


# A convolution's weight is stored plain, or weight-normed by either of torch's two implementations. The network uses
# the newer one for both; `file_key` gives back the older one's names.
_DIRECTION, _LENGTH = ".parametrizations.weight.original1", ".parametrizations.weight.original0"
_OLDER = {_DIRECTION: ".weight_v", _LENGTH: ".weight_g"}


def file_key(name: str, shapes: Shapes) -> str:
    """The key under which the file holds what the network calls `name`."""
    for newer, older in _OLDER.items():
        if name.endswith(newer) and name not in shapes:
            return name.removesuffix(newer) + older
    return name


def _weight_shape(shapes: Shapes, name: str) -> tuple[int, ...] | None:
    stored = (name + ending for ending in (".weight", _DIRECTION, _OLDER[_DIRECTION]))
    return next((shapes[key] for key in stored if key in shapes), None)


def _conv(shapes: Shapes, name: str, *, stride: int = 1, padding: int = 0, transposed: bool = False) -> nn.Module:
    shape = _weight_shape(shapes, name)
    if shape is None:
        raise CodebookError(f"the zalando layout lacks {name}.weight")
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    channels = (shape[0], shape[1]) if transposed else (shape[1], shape[0])
    module: nn.Module = kind(*channels, shape[2], stride=stride, padding=padding, bias=f"{name}.bias" in shapes)
    lengths = shapes.get(name + _LENGTH) or shapes.get(name + _OLDER[_LENGTH])
    if lengths is not None:
        axis = next((axis for axis, length in enumerate(lengths) if length > 1), 0)
        module = nn.utils.parametrizations.weight_norm(module, dim=axis)
    return module
